"""Choice of an op's implementation: PyTorch or Triton. This module imports neither torch nor Triton."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "MTPTRAIN_KERNELS"
INTERPRETER = "TRITON_INTERPRET"


class Kernels(StrEnum):
    """Values of the variable `MTPTRAIN_KERNELS`; if it is unset, tensors on a GPU go to Triton, others to PyTorch."""

    reference = "reference"  # PyTorch on any device
    triton = "triton"  # Triton on every device that can run it


def requested() -> Kernels | None:
    """Return the implementation that the environment requests, or None.

    Raises:
        ValueError: the requested implementation does not exist.
    """
    value = os.environ.get(VARIABLE, "")
    if value and value not in list(Kernels):
        raise ValueError(f"{VARIABLE}={value} is not known; use {' or '.join(Kernels)}, or leave it out")
    return Kernels(value) if value else None


def use_triton(op: str, tensor: Tensor, unfit: str | None = None) -> bool:
    """Return whether an op launches Triton for these arguments, and log once if it takes an unexpectedly slow path.

    Args:
        op: name of the op.
        tensor: any tensor argument of the op; all share one device.
        unfit: the reason why the kernel cannot take these arguments; None if it can.

    Raises:
        ValueError: the requested implementation does not exist.
    """
    choice = requested()
    if choice is None and not tensor.is_cuda:
        return False
    if choice is Kernels.reference:
        if tensor.is_cuda:
            _log_once(f"{op}: PyTorch instead of Triton, because {VARIABLE}={choice}")
        return False
    reason = unfit or _obstacle(tensor)
    if reason is not None:
        _log_once(f"{op}: PyTorch instead of Triton, because {reason}")
    return reason is None


def _obstacle(tensor: Tensor) -> str | None:
    """Return why Triton cannot run on the tensor's device, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not tensor.is_cuda and os.environ.get(INTERPRETER) != "1":
        return f"its tensors are on the {tensor.device.type} ({INTERPRETER}=1 would interpret the kernel there)"
    return None


@cache
def _log_once(message: str) -> None:
    logging.getLogger("mtptrain.kernels").warning(message)
