"""The device, the arithmetic and the threads that a run computes with."""

from __future__ import annotations

import os

import torch

from mtptrain.config import Device, Precision
from mtptrain.errors import UserError


def choose_device(wanted: Device) -> torch.device:
    """The torch device a run computes on.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    if wanted is Device.cpu or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns of no GPU
        return torch.device("cpu")
    return torch.device("cuda")


def choose_dtype(wanted: Precision, device: torch.device) -> torch.dtype:
    """Dtype of the matrices: bf16 on a GPU and fp32 on a CPU unless the user says otherwise."""
    if wanted is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[wanted]


def bound_threads(wanted: int | None, hidden_size: int) -> int:
    """Bound torch's CPU threads and return their number.

    A second thread gains nothing on tensors of the tiny preset's size, and costs a factor of 30 when another job
    holds the core (OpenMP threads spin); so small models run on one thread unless the user asks for more.
    """
    cores = len(os.sched_getaffinity(0))
    threads = wanted or (1 if hidden_size < 256 else max(1, cores // 2))
    torch.set_num_threads(threads)
    return threads
