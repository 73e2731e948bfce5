"""Measured peak rates of a device: the roofline for the times of the bench."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .measure import interleaved_seconds, observe


class Ceilings(NamedTuple):
    """Measured limits of one device."""

    flops_per_second: float  # of a large matrix product
    bytes_per_second: float  # read and written by a large copy

    def seconds(self, num_bytes: int, flops: int) -> float:
        """Return the least time for some work, if reading, writing and computing overlap perfectly."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return the best rates of a few large products and copies."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.zeros(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    runs = {"product": lambda: torch.mm(left, right, out=out), "copy": lambda: target.copy_(source)}
    first = {name: observe(run, device).seconds for name, run in runs.items()}
    best = {name: min(seconds) for name, seconds in interleaved_seconds(runs, first, 5, device).items()}
    return Ceilings(2 * size**3 / best["product"], 2 * source.numel() / best["copy"])
