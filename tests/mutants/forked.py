"""Run modules in forked processes that share one import of the heavy packages, which takes seconds."""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HEAVY = ("pytest", "safetensors.torch", "transformers.models.deepseek_v4.modeling_deepseek_v4", "hydra")
OURS = ("mtptrain", "tests")  # imported anew from the tree of each mutant
TIMEOUT = 900  # seconds; a fault may make a loop endless


class Ended(NamedTuple):
    """Exit code of a module, None if it did not end in time, and its output."""

    code: int | None
    output: str


def preload() -> None:
    """Import the heavy packages; call it before `run_module`, in a process without threads."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    if not torch.cuda.is_available():  # as in tests/conftest.py, before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    for name in HEAVY:
        importlib.import_module(name)


def fork(program: Callable[[], int]) -> int:
    """Run a function in a forked process that ends with its result as exit code; return the process's id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = program()
        except BaseException:  # the process must not go on as a second parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def run_module(tree: Path, module: str, arguments: list[str], log: Path) -> Ended:
    """Run `python -m MODULE ARGUMENTS` in a tree, with output to a file.

    Args:
        tree: a copy of the checkout, the working directory and first place of imports.
        module: a module, of the tree or of an installed package.
        arguments: of the module.
        log: file for the output.
    """

    def program() -> int:
        os.setsid()
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        return _run_here(tree, module, arguments)

    pid, deadline = fork(program), time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"))
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Ended(None, log.read_text(encoding="utf-8", errors="replace"))


def _run_here(tree: Path, module: str, arguments: list[str]) -> int:
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of the processes that the tests start
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(Path(__file__).parents[2])))]
    importlib.invalidate_caches()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return 0
