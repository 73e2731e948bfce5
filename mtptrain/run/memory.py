"""Memory of this process."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan starts without torch
    import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated by torch on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
