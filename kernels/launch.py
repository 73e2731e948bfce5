"""Descriptions of kernel launches for the ahead-of-time compiler; this module needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Constants = dict[str, Any]  # of a kernel, or options of its launch, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Dimensions of a model that the kernels use. Source: the released config.json."""

    width: int  # D
    heads: int
    vocabulary: int = 129_280  # V
    head_width: int = 512
    rope_width: int = 64  # channels of a head that are rotated, the last ones
    streams: int = 4  # N
    window: int = 128


MODELS = {"V4-Flash": Shapes(width=4096, heads=64), "V4-Pro": Shapes(width=7168, heads=128)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a kernel. The function `launches` of each `kernel.py` lists those of its op.

    Attributes:
        kernel: the function under `triton.jit`.
        label: distinguishes this launch from others of the kernel, for example by dtype or model.
        arguments: type of every non-constant argument, in any order, in Triton's notation: `*bf16`, `i32`, `fp32`. The
            suffix `:16` means that the pointer or number is divisible by 16; at run time Triton detects this itself.
        constants: value of every `tl.constexpr`.
        options: `num_warps` and other options that differ from their defaults.
        target: the only GPU for this launch, a key of `aot.TARGETS`; launches of one kernel and label share a row of
            the table. Empty for all GPUs.
        instruction: an instruction that the assembly must contain, such as the fast path of the tensor cores; a missing
            one is a failure.
    """

    kernel: Any
    label: str
    arguments: dict[str, str]
    constants: Constants = field(default_factory=dict)
    options: Constants = field(default_factory=dict)
    target: str = ""
    instruction: str = ""
