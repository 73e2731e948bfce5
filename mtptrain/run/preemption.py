"""Signals that end a run: SIGTERM, SIGUSR1, which Slurm sends before it ends a job, and SIGINT, which Ctrl-C sends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from mtptrain.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 arrived while nothing was left to be saved."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM and SIGUSR1 inside the block, so that a run cleans up and says how to go on."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    earlier = {number: _replace(number, leave) for number in SIGNALS if _is_main_thread()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class StopRequest:
    """A context manager in which a signal sets `is_made` instead of ending the process; a second Ctrl-C ends it.

    Args:
        unit: the part of the work that is finished and saved before the run ends, such as `step`.
    """

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit
        self.is_made = self.is_by_user = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if _is_main_thread():
            self._earlier = {number: _replace(number, self._remember) for number in SIGNALS}
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background jobs have it
                self._earlier[signal.SIGINT] = _replace(signal.SIGINT, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def ending(self, kept: str) -> Preempted:
        """Return the exception that ends the run; `kept` is the work on disk, as a sentence."""
        return Preempted(kept, self.is_by_user)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.is_made:
                raise KeyboardInterrupt
            self.is_by_user = True
            if os.environ.get("RANK", "0") == "0":  # not by print, which a signal may have interrupted
                line = f"\nthe run ends after this {self.unit}, which is saved; Ctrl-C again ends it at once\n"
                os.write(2, line.encode())
        self.is_made = True


def _replace(number: signal.Signals, handler: Any) -> Any:
    """Install a handler and return the earlier one."""
    return signal.signal(number, handler) or signal.SIG_DFL  # None: not installed from Python


def _is_main_thread() -> bool:
    """Return whether this is the only thread that may install handlers."""
    return threading.current_thread() is threading.main_thread()
