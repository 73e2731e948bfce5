"""Norm and rotation before an attention, forward and every gradient, beside torch.compile of the definition.

The definition computes as the block does eagerly. T tokens, H heads, C channels, r rotated channel pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..bench.case import Case, Outputs
from . import norm_and_rotate
from .reference import norm_and_rotate_reference

# T, H, C, r of the tiny backbone, of V4-Flash and of V4-Pro
SIZES = {"cpu": [(1024, 4, 32, 8)], "cuda": [(8192, 64, 512, 32), (8192, 128, 512, 32)]}
EPS = 1e-6


def cases(device: torch.device, sizes: str) -> Iterator[Case]:
    """Yield the comparisons of one list of sizes: queries and keys."""
    for T, H, C, r in SIZES[sizes]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        x, key = (torch.randn(1, T, *n, C, generator=generator, device=device).to(dtype) for n in ((H,), ()))
        angle = torch.randn(1, T, r, generator=generator, device=device)
        turn = torch.polar(torch.ones_like(angle), angle)
        weight = torch.rand(C, generator=generator, device=device) + 0.5
        heads, turn_of_heads = x.transpose(1, 2), turn.unsqueeze(1)
        yield _case(f"queries, {T} tokens, H {H}", heads, turn_of_heads)
        yield _case(f"keys, {T} tokens", key, turn, weight)


def _case(label: str, x: Tensor, turn: Tensor, weight: Tensor | None = None) -> Case:
    grad = torch.randn_like(x)

    def with_gradient(op: Callable[..., Tensor]) -> Callable[[], Outputs]:
        leaves = [value.detach().requires_grad_() for value in (x, weight) if value is not None]

        def run() -> Outputs:
            out = op(leaves[0], turn, *leaves[1:], eps=EPS)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad))

        return run

    return Case(
        label=f"{label}, C {x.shape[-1]}, r {turn.shape[-1]}, {x.dtype}: forward and gradients",
        ours=with_gradient(norm_and_rotate),
        definition=with_gradient(norm_and_rotate_reference),
        peers={"torch.compile of definition": with_gradient(torch.compile(norm_and_rotate_reference, dynamic=False))},
        # Forward reads and writes once; backward reads the input and a gradient and writes one.
        bytes=5 * x.numel() * x.element_size(),
        rtol=1e-4 if x.dtype is torch.float32 else 2**-6,
        atol=1e-4 if x.dtype is torch.float32 else 2**-6,
    )
