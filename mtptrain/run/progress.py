"""Progress of a long loop, as a live line on a terminal and otherwise a plain line every few seconds, and of a wait."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mtptrain.config.verbosity import is_quiet, print_status
from mtptrain.run.distributed import rank

T = TypeVar("T")

LOGGER = logging.getLogger("mtptrain.run")

SECONDS_BETWEEN_LINES = 5.0
QUIET_SECONDS = 2.0  # a wait that ends earlier prints nothing
SECONDS_BETWEEN_SIGNS = 30.0  # of a wait


def clock(seconds: float) -> str:
    """Return a duration as `minutes:seconds`, or from an hour on as `1h05m`."""
    whole = int(seconds)
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"


@contextmanager
def waiting(label: str, share: Callable[[], float] | None = None) -> Iterator[None]:
    """Print what the block is doing if it takes longer than a moment, and again with its time every half minute.

    For work without a line of its own for every step; on rank 0 only.

    Args:
        label: the work.
        share: returns how much of the work is done, 0 to 1; with it the remaining time is estimated.
    """
    ended, begun = threading.Event(), time.monotonic()

    def print_signs() -> None:
        pause = QUIET_SECONDS
        while not ended.wait(pause):
            spent = time.monotonic() - begun
            done = share() if share is not None else 0.0
            left = f", about {clock(math.ceil(spent * (1 - done) / done))} left" if 0 < done < 1 else ""
            print_status(f"{label}, for {clock(spent)} so far{left}")
            pause = SECONDS_BETWEEN_SIGNS

    thread = threading.Thread(target=print_signs, daemon=True)
    if os.environ.get("RANK", "0") == "0":
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        LOGGER.debug("%s: %.1f s", label, time.monotonic() - begun)


def counted(label: str, steps: Sequence[T]) -> Iterator[T]:
    """Yield the steps of a wait; from the first finished step on, its signs estimate the remaining time."""
    done = 0
    with waiting(label, lambda: done / len(steps)):
        for step in steps:
            yield step
            done += 1


class Progress:
    """Shows step, metrics, rate and remaining time, on rank 0 only. A context manager.

    Args:
        label: name of the loop.
        total: steps of the whole loop.
        start: steps done by an earlier run.
        unit: of the rate, per second.
    """

    def __init__(self, label: str, total: int, start: int = 0, unit: str = "tok") -> None:
        self.label, self.total, self.start, self.unit = label, total, start, unit
        self.console = Console(file=sys.stderr)
        self.is_shown = rank() == 0 and not is_quiet()
        is_live = self.is_shown and self.console.is_terminal
        self.live = Live(console=self.console, refresh_per_second=4) if is_live else None
        self.begun = time.monotonic()
        self.amount = 0
        self.last_line = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, step: int, figures: str, amount: int) -> None:
        """Show that `step` steps are done.

        Args:
            step: steps done, including those of earlier runs.
            figures: formatted metrics to show beside the step.
            amount: units processed since the last call.
        """
        self.amount += amount
        elapsed = max(time.monotonic() - self.begun, 1e-9)
        left = math.ceil(elapsed / max(step - self.start, 1) * (self.total - step))  # 0:00 is the end
        rate = self.amount / elapsed
        speed = f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"
        line = f"{self.label} {step}/{self.total}  {figures}  {speed}  {clock(left)} left"
        if self.live is not None:
            self.live.update(Text(line))
        elif self.is_shown and (elapsed - self.last_line >= SECONDS_BETWEEN_LINES or step == self.total):
            self.last_line = elapsed
            print_status(line)
