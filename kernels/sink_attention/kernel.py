"""Triton for `sink_attention`. A program takes one query and a block of its heads, which share all keys.

With z the scores times `scale`, p their softmax over keys and sink, o = p @ keys, and delta = do . o (the sink has the
value zero, so this is the sum of p dp over all keys), the gradients are

    dp = do @ keys^T      dz = p (dp - delta)      dquery = scale dz @ keys
    dkey = sum over queries and heads of scale dz query + p do                  (a key is its own value)
    dsink = - sum over queries of p_sink delta

The output is o, rotated back by the query's position, and do its gradient, rotated by that position. Their product
delta is that of the rotated ones, too. The backward computes p again from the scores and their log-sum-exp. Every
output is written by one program: there are no atomics, and the result does not depend on the order of programs.
"""

# B rows, S queries, X local keys, H heads, C head width, E further keys, G blocks of heads, r rotated channel pairs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..device import on_its_device
from .backward_kernel import (
    sink_attention_chain_backward_kernel,
    sink_attention_key_backward_kernel,
    sink_attention_query_backward_kernel,
)
from .blocks import choose
from .forward_kernel import CHAIN, CHOSEN, CLOSED, NONE, sink_attention_forward_kernel
from .launches import launches
from .reference import Cached

__all__ = ["cached_attention_triton", "launches", "rollout_attention_triton"]


def _strides(query_BHSC: Tensor) -> tuple[int, int, int]:
    """Return the strides of rows, slots and heads; channels must be contiguous."""
    assert query_BHSC.stride(3) == 1
    return query_BHSC.stride(0), query_BHSC.stride(2), query_BHSC.stride(1)


def _real(turn_BSr: Tensor) -> Tensor:
    """Return rotations as real numbers [B, S, r, 2], contiguous within a row."""
    return torch.view_as_real(turn_BSr.resolve_conj().contiguous())


def _stride_of_rows(turn_BSr2: Tensor, batch: int) -> int:
    """Return the stride between rows, which may share one row of rotations."""
    return turn_BSr2.stride(0) if len(turn_BSr2) == batch else 0


def _forward(
    query_BHSC: Tensor,
    local_BXC: Tensor,
    sinks_H: Tensor,
    *,
    turn_BSr2: Tensor | None,
    start_BS: Tensor | None = None,
    length_B: Tensor | None = None,
    extra: Tensor | None = None,
    chosen_BSE: Tensor | None = None,
    window: int,
    rate: int = 1,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output [B, S, H, C] and log-sum-exp [B, S, H]; the arguments are those of the kernel."""
    batch, num_heads, num_slots, channels = query_BHSC.shape
    out_BSHC = query_BHSC.new_empty(batch, num_slots, num_heads, channels)
    lse_BSH = query_BHSC.new_empty(out_BSHC.shape[:3], dtype=torch.float32)
    kind, num_extra, extra_stride = NONE, 0, 0
    if extra is not None:
        kind, num_extra, extra_stride = CLOSED, extra.shape[-2], extra.stride(0)
        if chosen_BSE is not None:
            kind, num_extra = CHOSEN, chosen_BSE.shape[2]
        elif extra.ndim == 4:
            kind, extra_stride = CHAIN, num_extra * channels
    blocks, options = choose("forward", query_BHSC)
    sink_attention_forward_kernel[(batch * num_slots, triton.cdiv(num_heads, blocks["BLOCK_H"]))](
        query_BHSC,
        local_BXC,
        extra,
        chosen_BSE,
        sinks_H,
        start_BS,
        length_B,
        turn_BSr2,
        out_BSHC,
        lse_BSH,
        scale,
        num_heads,
        num_slots,
        local_BXC.shape[1],
        num_extra,
        *_strides(query_BHSC),
        extra_stride,
        0 if turn_BSr2 is None else _stride_of_rows(turn_BSr2, batch),
        window,
        rate,
        PAIRS=0 if turn_BSr2 is None else turn_BSr2.shape[2],
        EXTRA=kind.value,
        CACHED=length_B is not None,
        **blocks,
        **options,
    )
    return out_BSHC, lse_BSH


@on_its_device
def rollout_attention_triton(
    query_BHSC: Tensor,
    context_BSC: Tensor,
    chain_BSLC: Tensor | None,
    sinks_H: Tensor,
    start_BS: Tensor,
    turn_BSr: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Return `rollout_attention_reference`: one launch forward, three backward; memory linear in S."""
    return _RolloutAttention.apply(query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, turn_BSr, window, scale)


@on_its_device
def cached_attention_triton(
    query_BHSC: Tensor,
    cached: Cached,
    sinks_H: Tensor,
    turn_BSr: Tensor | None = None,
    *,
    window: int,
    rate: int,
    scale: float,
) -> Tensor:
    """Return `cached_attention_reference`, in one launch; no gradient."""
    out_BSHC, _ = _forward(
        query_BHSC,
        cached.local_BXC.contiguous(),
        sinks_H,
        turn_BSr2=None if turn_BSr is None else _real(turn_BSr),
        length_B=cached.length_B,
        extra=cached.entries_BWC,
        chosen_BSE=None if cached.chosen_BST is None else cached.chosen_BST.contiguous(),
        window=window,
        rate=rate,
        scale=scale,
    )
    return out_BSHC.transpose(1, 2)


class _RolloutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHSC: Tensor,
        context_BSC: Tensor,
        chain_BSLC: Tensor | None,
        sinks_H: Tensor,
        start_BS: Tensor,
        turn_BSr: Tensor,
        window: int,
        scale: float,
    ) -> Tensor:
        context_BSC, start_BS, turn_BSr2 = context_BSC.contiguous(), start_BS.contiguous(), _real(turn_BSr)
        chain_BSLC = None if chain_BSLC is None else chain_BSLC.contiguous()
        out_BSHC, lse_BSH = _forward(
            query_BHSC,
            context_BSC,
            sinks_H,
            turn_BSr2=turn_BSr2,
            start_BS=start_BS,
            extra=chain_BSLC,
            window=window,
            scale=scale,
        )
        ctx.save_for_backward(query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, turn_BSr2, out_BSHC, lse_BSH)
        ctx.window, ctx.scale = window, scale
        return out_BSHC.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, turn_BSr2, out_BSHC, lse_BSH = ctx.saved_tensors
        # A contiguous copy of the queries: offsets known at compile time save registers.
        query_BSHC, grad_out_BSHC = (x.transpose(1, 2).contiguous() for x in (query_BHSC, grad_out_BHSC))
        saved = _Saved(query_BSHC, context_BSC, chain_BSLC, start_BS, lse_BSH, ctx.window, ctx.scale)
        delta_BSH, grad_BSHC, grad_chain_BSLC = _chain_backward(saved, turn_BSr2, out_BSHC, grad_out_BSHC)
        grad_query_BHSC = _query_backward(saved, delta_BSH, grad_BSHC).transpose(1, 2)
        grad_context_BSC = _key_backward(saved, delta_BSH, grad_BSHC)
        grad_sinks_H = -((sinks_H.float() - lse_BSH).exp() * delta_BSH).sum((0, 1)).to(sinks_H.dtype)
        return grad_query_BHSC, grad_context_BSC, grad_chain_BSLC, grad_sinks_H, None, None, None, None


class _Saved(NamedTuple):
    """Inputs of the backward's launches, contiguous."""

    query_BSHC: Tensor
    context_BSC: Tensor
    chain_BSLC: Tensor | None
    start_BS: Tensor
    lse_BSH: Tensor
    window: int
    scale: float

    def num_chain(self) -> int:
        return 0 if self.chain_BSLC is None else self.chain_BSLC.shape[2]

    def choose(self, kernel: str) -> tuple[dict[str, int], dict[str, Any]]:
        return choose(kernel, self.query_BSHC.transpose(1, 2))


def _chain_backward(
    saved: _Saved, turn_BSr2: Tensor, out_BSHC: Tensor, grad_out_BSHC: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return delta [B, S, H], the gradient of the output before it is rotated back, and that of the chain or None."""
    batch, num_slots, num_heads, channels = out_BSHC.shape
    blocks, options = saved.choose("chain_backward")
    groups = triton.cdiv(num_heads, blocks["BLOCK_H"])
    delta_BSH, grad_BSHC, grad_chain_BSGLC = torch.empty_like(saved.lse_BSH), torch.empty_like(grad_out_BSHC), None
    if saved.chain_BSLC is not None:
        grad_chain_BSGLC = delta_BSH.new_empty(batch, num_slots, groups, saved.num_chain(), channels)
    sink_attention_chain_backward_kernel[(batch * num_slots, groups)](
        saved.query_BSHC,
        saved.chain_BSLC,
        out_BSHC,
        saved.lse_BSH,
        turn_BSr2,
        grad_out_BSHC,
        delta_BSH,
        grad_BSHC,
        grad_chain_BSGLC,
        saved.scale,
        num_heads,
        num_slots,
        saved.num_chain(),
        _stride_of_rows(turn_BSr2, batch),
        PAIRS=turn_BSr2.shape[2],
        EXTRA=(NONE if saved.chain_BSLC is None else CHAIN).value,
        **blocks,
        **options,
    )
    if grad_chain_BSGLC is None or saved.chain_BSLC is None:
        return delta_BSH, grad_BSHC, None
    return delta_BSH, grad_BSHC, grad_chain_BSGLC.sum(2).to(saved.chain_BSLC.dtype)


def _query_backward(saved: _Saved, delta_BSH: Tensor, grad_BSHC: Tensor) -> Tensor:
    """Return the gradient of the queries, [B, S, H, C]."""
    batch, num_slots, num_heads, _ = saved.query_BSHC.shape
    grad_query_BSHC = torch.empty_like(saved.query_BSHC)
    blocks, options = saved.choose("query_backward")
    sink_attention_query_backward_kernel[(batch * num_slots, triton.cdiv(num_heads, blocks["BLOCK_H"]))](
        saved.query_BSHC,
        saved.context_BSC,
        saved.chain_BSLC,
        saved.start_BS,
        saved.lse_BSH,
        grad_BSHC,
        delta_BSH,
        grad_query_BSHC,
        saved.scale,
        num_heads,
        num_slots,
        saved.num_chain(),
        saved.window,
        EXTRA=(NONE if saved.chain_BSLC is None else CHAIN).value,
        **blocks,
        **options,
    )
    return grad_query_BSHC


def _key_backward(saved: _Saved, delta_BSH: Tensor, grad_BSHC: Tensor) -> Tensor:
    """Return the gradient of the base-step keys, [B, S, C]."""
    batch, num_slots, num_heads, _ = saved.query_BSHC.shape
    grad_context_BSC = torch.empty_like(saved.context_BSC)
    blocks, options = saved.choose("key_backward")
    sink_attention_key_backward_kernel[(triton.cdiv(num_slots, blocks["BLOCK_N"]), batch)](
        saved.query_BSHC,
        saved.context_BSC,
        saved.start_BS,
        saved.lse_BSH,
        delta_BSH,
        grad_BSHC,
        grad_context_BSC,
        saved.scale,
        num_heads,
        num_slots,
        saved.window - saved.num_chain(),
        **blocks,
        **options,
    )
    return grad_context_BSC
