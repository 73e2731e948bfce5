"""The packages that processes of tests begin with."""

# ruff: noqa: E402, F401 (collections would visit the imported objects, which stay)

import gc
import os

gc.disable()

import deepspeed

import mtptrain.cli
import mtptrain.recipes.distill

os.fsync = lambda descriptor: None  # as in conftest
gc.freeze()
gc.enable()
