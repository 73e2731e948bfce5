"""`sink_attention` beside its dense definition, as transformers computes it eagerly, and torch.compile of it.

B rows, S queries, H heads, C head width, L chain keys, W compressed entries, T entries chosen for a query,
r rotated channel pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..bench.case import Case, Outputs
from . import Cached, cached_attention, rollout_attention
from .reference import cached_attention_reference, rollout_attention_reference

# B, S, H, C, L, window of the tiny backbone's head and of V4-Flash's. At K steps, L is 0 to K - 1.
SIZES = {
    "cpu": [(4, 256, 4, 32, 0, 64), (4, 256, 4, 32, 2, 64), (1, 4096, 4, 32, 2, 64)],
    "cuda": [(1, 8192, 64, 512, 0, 128), (1, 8192, 64, 512, 2, 128)],
}
# S, H, C, rate, T, window of prefills of HCA (no T) and CSA layers. At 32,768 a GPU computes the definition in pieces.
LAYERS = {
    "cpu": [(2048, 4, 32, 16, None, 64), (2048, 4, 32, 4, 16, 64)],
    "cuda": [(S, 64, 512, *layer, 128) for S in (8192, 32_768) for layer in ((128, None), (4, 512))],
}

PIECE = 2**29  # scores in a piece of the definition, 2 GB in fp32
LONGEST_WHOLE = 8192  # slots; with more, no GPU holds the scores of all heads


def cases(device: torch.device, sizes: str) -> Iterator[Case]:
    """Yield the comparisons of one list of sizes."""
    for size in SIZES[sizes]:
        yield _rollout(device, *size)
    for layer in LAYERS[sizes]:
        yield _prefill(device, *layer)


def _turns(device: torch.device, B: int, S: int, C: int) -> Tensor:
    """Return the rotations of positions 0 to S - 1, of 64 channels at V4's width."""
    frequency_r = 1e4 ** -torch.linspace(0, 1, min(32, C // 4), device=device)
    angle_Sr = torch.arange(S, device=device).unsqueeze(1) * frequency_r
    return torch.polar(torch.ones_like(angle_Sr), angle_Sr).expand(B, -1, -1)


def _prefill(device: torch.device, S: int, H: int, C: int, rate: int, T: int | None, window: int) -> Case:
    dtype, W = torch.bfloat16 if device.type == "cuda" else torch.float32, S // rate
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    chosen_1ST = None
    if T is not None:  # spread over the complete entries
        closed_S1 = (torch.arange(S, device=device) + 1).unsqueeze(1) // rate
        entry_ST = torch.arange(T, device=device) * closed_S1.clamp(min=T) // T
        chosen_1ST = torch.where(entry_ST < closed_S1, entry_ST, -1).unsqueeze(0)
    query = values(1, S, H, C).transpose(1, 2)
    cached = Cached(values(1, S, C), values(1, W, C), chosen_1ST, torch.zeros(1, dtype=torch.int64, device=device))
    sinks_H, turn_1Sr = values(H).float(), _turns(device, 1, S, C)

    def forward(op: Callable[..., Tensor]) -> Callable[[], Outputs]:
        return lambda: (op(query, cached, sinks_H, turn_1Sr, window=window, rate=rate, scale=C**-0.5),)

    def in_pieces() -> Outputs:
        settings = {"window": window, "rate": rate, "scale": C**-0.5}
        size = max(1, PIECE // (S * (S + W)))
        heads = zip(query.split(size, dim=1), sinks_H.split(size), strict=True)
        pieces = [cached_attention_reference(part, cached, sinks, turn_1Sr, **settings) for part, sinks in heads]
        return (torch.cat(pieces, 1),)

    compiled = {"torch.compile of definition": forward(torch.compile(cached_attention_reference, dynamic=False))}
    fits = S <= LONGEST_WHOLE
    keys = window + (T if T is not None else W // 2)
    return Case(
        label=f"{'HCA' if T is None else 'CSA'} prefill, S {S}, H {H}, C {C}, rate {rate}, {dtype}: forward",
        ours=forward(cached_attention),
        definition=forward(cached_attention_reference),
        in_pieces=in_pieces,
        peers=compiled if fits else {},
        missing={} if fits else dict.fromkeys(compiled, "it holds the scores of all heads"),
        bytes=query.element_size() * C * (2 * S * H + S + W),
        flops=2 * 2 * S * H * C * keys,
        rtol=1e-4 if dtype is torch.float32 else 2**-6,
        atol=1e-4 if dtype is torch.float32 else 2**-6,
    )


def _rollout(device: torch.device, B: int, S: int, H: int, C: int, L: int, window: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, sinks = values(B, S, H, C).transpose(1, 2), values(H).float()
    leaves = [query, values(B, S, C), values(B, S, L, C) if L else None, sinks]
    differentiated = [x.requires_grad_() for x in leaves if x is not None]
    start_BS, grad = torch.zeros(B, S, dtype=torch.int64, device=device), values(B, H, S, C)
    turn_BSr = _turns(device, B, S, C)

    def with_gradient(op: Callable[..., Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            out = op(*leaves, start_BS, turn_BSr, window=window, scale=C**-0.5)
            return (out.detach(), *torch.autograd.grad(out, differentiated, grad))

        return run

    def in_pieces() -> Outputs:
        copies = [x.detach().float().requires_grad_() for x in differentiated]  # the sum over heads is in fp32
        queries, *keys, all_sinks = copies
        out = []
        size = max(1, PIECE // S**2)
        for heads in (slice(begin, begin + size) for begin in range(0, H, size)):
            inputs = queries[:, heads].to(dtype), keys[0], keys[1] if L else None, all_sinks[heads], start_BS, turn_BSr
            out.append(rollout_attention_reference(*inputs, window=window, scale=C**-0.5))
            out[-1].backward(grad[:, heads])
        pairs = zip(copies, differentiated, strict=True)
        gradients = [copy.grad.to(x.dtype) for copy, x in pairs if copy.grad is not None]
        return torch.cat(out, 1).detach(), *gradients

    element = grad.element_size()
    return Case(
        label=f"rollout, B {B}, S {S}, H {H}, C {C}, L {L}, window {window}, {dtype}: forward and gradients",
        ours=with_gradient(rollout_attention),
        definition=with_gradient(rollout_attention_reference),
        in_pieces=in_pieces,
        peers={"torch.compile of definition": with_gradient(torch.compile(rollout_attention_reference, dynamic=False))},
        bytes=element * B * S * C * (6 * H + 4 * (1 + L)),
        flops=7 * 2 * B * S * H * C * min(window, S),  # 2 products forward, 5 backward
        rtol=1e-4 if dtype is torch.float32 else 2**-6,
        atol=1e-4 if dtype is torch.float32 else 2**-6,
    )
