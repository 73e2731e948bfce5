"""Start modules in processes forked from one that has imported the heavy packages, which takes a new one five seconds.

Launchers, signals and the installed command have tests that start whole programs as users do.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
SECONDS = 900  # until a process counts as stuck


@contextmanager
def output_in(path: Path) -> Iterator[None]:
    """Send stdout and stderr of this process, and of those that it starts, to a file."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for number in kept:
                os.close(number)


def _run(module: str, arguments: Sequence[str], folder: Path, variables: dict[str, str], output: Path) -> None:
    """Do what `python -m MODULE ARGUMENTS` does, with output to two files; called in the forked process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class WarmProcess:
    """A module in a forked process; it has the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, module: str, *arguments: str, folder: Path = ROOT, output: Path | None = None, **variables: str
    ) -> None:
        """Start a module.

        Args:
            module: whose `__main__` runs.
            arguments: of its command line.
            folder: the working directory.
            output: folder of the files `stdout` and `stderr`, to which the process appends; None for a new one.
            variables: of its environment, beside those of this process.
        """
        self._own = None if output else tempfile.TemporaryDirectory()
        self._output = output or Path(self._own.name)  # type: ignore[union-attr]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        self._process = CONTEXT.Process(target=_run, args=(module, arguments, folder, environment, self._output))
        # The first start also starts the process that imports; it must neither write into a test's output nor open a
        # GPU, which its forks could not use.
        server = {"PYTHONPATH": str(ROOT), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if not torch.cuda.is_available():
            server["DS_ACCELERATOR"] = "cpu"
        with patch.dict(os.environ, server), output_in(Path(os.devnull)):
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Wait until the process has ended and return its stdout and stderr; one that is stuck is killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
        return read_output(self._output)


def read_output(folder: Path) -> tuple[str, str]:
    """Return stdout and stderr of the processes with that folder of output."""
    files = (folder / "stdout", folder / "stderr")
    output, errors = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
    return output, errors


class Ended(NamedTuple):
    """Exit codes of two processes, and the stdout and stderr of both."""

    codes: tuple[int | None, int | None]
    output: str
    errors: str


def run_in_two(module: str, *arguments: str) -> Ended:
    """Run a module in two processes as torchrun does, which ends the other one with SIGTERM after one has failed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store of its own
        "TORCHELASTIC_RESTART_COUNT": "0",
        "DS_ACCELERATOR": "cpu",
    }
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        one, other = (
            WarmProcess(module, *arguments, output=output, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")
        )
        deadline = time.monotonic() + SECONDS
        while None in (one.poll(), other.poll()) and not (one.poll() or other.poll()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in (one, other):
            if process.poll() is None:
                process.terminate()
            process.communicate(30)  # then it is killed, as by torchrun
        return Ended((one.returncode, other.returncode), *read_output(output))
