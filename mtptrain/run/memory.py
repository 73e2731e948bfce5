"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan starts without torch
    import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated by torch on a GPU, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def out_of_memory_reason(error: BaseException) -> str | None:
    """Return what was too large, in the allocator's words, if an allocation failed; None for any other error."""
    torch = sys.modules.get("torch")
    is_of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    text = str(error)
    if is_of_gpu or isinstance(error, MemoryError):
        return text.removeprefix("CUDA out of memory. ").split(". ")[0] or "MemoryError"
    start = text.find(CPU_ALLOCATOR)
    return None if start < 0 else text[start + len(CPU_ALLOCATOR) :].split(". ")[0].strip()


CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory:"  # torch raises a plain RuntimeError
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
MOST_KEPT, LARGEST_KEPT = 2**28, 2**25  # bytes: freed memory at the end of the heap, one block of it


def keep_freed_memory() -> None:
    """Keep freed tensors of up to 32 MB for new ones, up to 256 MB in all; only with the C library of Linux.

    Otherwise it returns them to the system, and every step of a training touches thousands of fresh pages again, which
    costs more than some passes over them.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
