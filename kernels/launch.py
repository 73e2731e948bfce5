"""How kernels are launched, in words that the ahead-of-time compiler understands; needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What the kernels need to know of a model. Source: the released config.json."""

    width: int  # D
    heads: int
    vocabulary: int = 129_280  # V
    head_width: int = 512
    streams: int = 4  # N
    window: int = 128


MODELS = {"V4-Flash": Shapes(width=4096, heads=64), "V4-Pro": Shapes(width=7168, heads=128)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One way to launch a kernel. Each `kernel.py` lists its own in a function `launches`.

    Attributes:
        kernel: the function under `triton.jit`.
        label: what sets this launch apart, such as a dtype or a model.
        arguments: type of every argument that is not a constant, in any order, as Triton writes them: `*bf16`, `i32`,
            `fp32`. `:16` after it says that the pointer or number is divisible by 16, which Triton finds out by itself
            when it launches.
        constants: value of every `tl.constexpr`.
        options: `num_warps` and what else is not left at its default.
        target: the only GPU that it is for, as in `aot.TARGETS`; launches of one kernel and label share a row of the
            table. Empty: for all.
        instruction: what its assembly must hold, such as the tensor cores' fast path; without it, it is a failure.
    """

    kernel: Any
    label: str
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    instruction: str = ""
