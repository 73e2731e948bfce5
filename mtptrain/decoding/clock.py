"""Where the wall time of a decoding run goes."""

from __future__ import annotations

import time

import torch

from mtptrain.decoding.records import Seconds


class Clock:
    """Adds the time since the last lap to one of the fields of `seconds`; waits for the GPU before it reads the time.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Seconds()
        self.started = self.last = self._now()

    def lap(self, phase: str) -> None:
        """Count what ran since the last lap as `phase`, a field of `Seconds`."""
        now = self._now()
        setattr(self.seconds, phase, getattr(self.seconds, phase) + now - self.last)
        self.last = now

    def skip(self) -> None:
        """Count what ran since the last lap towards the total only."""
        self.last = time.perf_counter()

    def stop(self) -> Seconds:
        """The account, with its total: all time but that of recording."""
        self.seconds.total = self._now() - self.started - self.seconds.record
        return self.seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
