"""The GPU of a launch: Triton takes the current one, whichever holds the tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(op: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Let an op launch on the GPU of its first argument, as torch's own ops do.

    The layers of a backbone may lie on several GPUs of one process. A kernel on another GPU than its tensors' would
    not wait for the work that fills them, and may not be allowed to read them. In a backward, autograd does the same.
    """

    @wraps(op)
    def run(first: Tensor, *others: P.args, **settings: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return op(first, *others, **settings)

    return run
