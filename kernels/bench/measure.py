"""Time and extra memory of a call.

On a CPU, seconds are processor time of this process, which runs one thread: on a machine that also does other work,
wall-clock time says little.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHORTEST_SECONDS = 0.02  # shorter calls are repeated until a measurement takes this long
PROCESS = Path("/proc/self")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" else time.perf_counter


def _seconds(run: Callable[[], Any], count: int, device: torch.device) -> float:
    clock = _clock(device)
    _wait(device)
    begun = clock()
    for _ in range(count):
        run()
    _wait(device)
    return (clock() - begun) / count


class Observed(NamedTuple):
    """Outputs, time and memory of one call."""

    outputs: Any
    seconds: float
    extra_bytes: int | None  # peak memory above the level before the call, outputs included; None if not measurable


def observe(run: Callable[[], Any], device: torch.device) -> Observed:
    """Call once, and return its outputs, time and extra memory."""
    gc.collect()
    clock = _clock(device)
    outputs: list[Any] = []
    begun = clock()
    extra_bytes = _extra_bytes(lambda: outputs.append(run()), device)
    return Observed(outputs[0], clock() - begun, extra_bytes)


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Any]], first: Mapping[str, float], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every call in every round; all run once in a round, in a different order each time.

    Args:
        runs: functions to call, by name.
        first: seconds of one earlier call of each; short calls are repeated.
        rounds: number of measurements of each, at least 1.
        device: the device on which they run.
    """
    names = list(runs)
    counts = {name: 1 + int(SHORTEST_SECONDS / max(first[name], 1e-6)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds(runs[name], counts[name], device))
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status_bytes("VmRSS")
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # resets the peak: man 5 proc
    except OSError:
        run()
        return None
    run()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    lines = (PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
