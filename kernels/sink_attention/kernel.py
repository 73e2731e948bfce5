"""Triton for `sink_attention`. A program takes one query and a block of its heads, which share all their keys.

With z the scores times `scale`, p their softmax over keys and sink, o = p @ keys, and delta = do . o (the sink has the
value zero, so this is the sum of p dp over all keys), the gradients are

    dp = do @ keys^T      dz = p (dp - delta)      dquery = scale dz @ keys
    dkey = sum over queries and heads of scale dz query + p do                  (a key is its own value)
    dsink = - sum over queries of p_sink delta

The backward computes p again from the scores and their log-sum-exp. Every output has one owner: no atomics, and the
result does not depend on the order of programs.
"""

# B rows, S queries, X local keys, H heads, C head width, E further keys, G blocks of heads

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import MODELS, Launch
from .backward_kernel import (
    sink_attention_chain_backward_kernel,
    sink_attention_key_backward_kernel,
    sink_attention_query_backward_kernel,
)
from .blocks import BLOCKS, choose, constants
from .forward_kernel import CHAIN, CHOSEN, CLOSED, NONE, sink_attention_forward_kernel
from .reference import Cached

TENSOR_CORES = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}  # what takes products of 64 rows


def _strides(query_BHSC: Tensor) -> tuple[int, int, int]:
    """Of rows, slots and heads; channels must be contiguous."""
    assert query_BHSC.stride(3) == 1
    return query_BHSC.stride(0), query_BHSC.stride(2), query_BHSC.stride(1)


def _forward(
    query_BHSC: Tensor,
    local_BXC: Tensor,
    sinks_H: Tensor,
    *,
    start_BS: Tensor | None = None,
    length_B: Tensor | None = None,
    extra: Tensor | None = None,
    chosen_BSE: Tensor | None = None,
    window: int,
    rate: int = 1,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, C] and log-sum-exp [B, S, H]; the arguments are those of the kernel."""
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
        out_BSHC,
        lse_BSH,
        scale,
        num_heads,
        num_slots,
        local_BXC.shape[1],
        num_extra,
        *_strides(query_BHSC),
        extra_stride,
        window,
        rate,
        EXTRA=kind.value,
        CACHED=length_B is not None,
        **blocks,
        **options,
    )
    return out_BSHC, lse_BSH


def rollout_attention_triton(
    query_BHSC: Tensor,
    context_BSC: Tensor,
    chain_BSLC: Tensor | None,
    sinks_H: Tensor,
    start_BS: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """`rollout_attention_reference`: one launch forward, three backward; memory linear in S."""
    return _RolloutAttention.apply(query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, window, scale)


def cached_attention_triton(
    query_BHSC: Tensor, cached: Cached, sinks_H: Tensor, *, window: int, rate: int, scale: float
) -> Tensor:
    """`cached_attention_reference` in one launch; no gradient."""
    out_BSHC, _ = _forward(
        query_BHSC,
        cached.local_BXC.contiguous(),
        sinks_H,
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
        window: int,
        scale: float,
    ) -> Tensor:
        context_BSC, start_BS = context_BSC.contiguous(), start_BS.contiguous()
        chain_BSLC = None if chain_BSLC is None else chain_BSLC.contiguous()
        out_BSHC, lse_BSH = _forward(
            query_BHSC, context_BSC, sinks_H, start_BS=start_BS, extra=chain_BSLC, window=window, scale=scale
        )
        ctx.save_for_backward(query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, out_BSHC, lse_BSH)
        ctx.window, ctx.scale = window, scale
        return out_BSHC.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, out_BSHC, lse_BSH = ctx.saved_tensors
        batch, num_slots, num_heads, _ = out_BSHC.shape
        # A copy of queries whose heads lie outermost; offsets that the kernels know save them the registers.
        query_BSHC, grad_out_BSHC = (x.transpose(1, 2).contiguous() for x in (query_BHSC, grad_out_BHSC))
        grad_query_BSHC, delta_BSH = torch.empty_like(out_BSHC), torch.empty_like(lse_BSH)
        extra = (NONE if chain_BSLC is None else CHAIN).value
        numbers = (ctx.scale, num_heads, num_slots)

        blocks, options = choose("chain_backward", query_BHSC)
        groups = triton.cdiv(num_heads, blocks["BLOCK_H"])
        num_chain, grad_chain_BSGLC = 0, None
        if chain_BSLC is not None:
            num_chain = chain_BSLC.shape[2]
            grad_chain_BSGLC = lse_BSH.new_empty(batch, num_slots, groups, *chain_BSLC.shape[2:])
        sink_attention_chain_backward_kernel[(batch * num_slots, groups)](
            query_BSHC,
            chain_BSLC,
            out_BSHC,
            lse_BSH,
            grad_out_BSHC,
            delta_BSH,
            grad_chain_BSGLC,
            ctx.scale,
            num_heads,
            num_chain,
            EXTRA=extra,
            **blocks,
            **options,
        )
        blocks, options = choose("query_backward", query_BHSC)
        sink_attention_query_backward_kernel[(batch * num_slots, triton.cdiv(num_heads, blocks["BLOCK_H"]))](
            query_BSHC,
            context_BSC,
            chain_BSLC,
            start_BS,
            lse_BSH,
            grad_out_BSHC,
            delta_BSH,
            grad_query_BSHC,
            *numbers,
            num_chain,
            ctx.window,
            EXTRA=extra,
            **blocks,
            **options,
        )
        blocks, options = choose("key_backward", query_BHSC)
        grad_context_BSC = torch.empty_like(context_BSC)
        sink_attention_key_backward_kernel[(triton.cdiv(num_slots, blocks["BLOCK_N"]), batch)](
            query_BSHC,
            context_BSC,
            start_BS,
            lse_BSH,
            delta_BSH,
            grad_out_BSHC,
            grad_context_BSC,
            *numbers,
            ctx.window - num_chain,
            **blocks,
            **options,
        )
        grad_sinks_H = -((sinks_H.float() - lse_BSH).exp() * delta_BSH).sum((0, 1)).to(sinks_H.dtype)
        grad_chain_BSLC = None if grad_chain_BSGLC is None else grad_chain_BSGLC.sum(2).to(chain_BSLC.dtype)
        return grad_query_BSHC.transpose(1, 2), grad_context_BSC, grad_chain_BSLC, grad_sinks_H, None, None, None


def launches() -> list[Launch]:
    """What is compiled ahead of time; the number of heads is an argument, so one serves V4-Flash and V4-Pro."""
    shapes = MODELS["V4-Flash"]
    pointers = dict.fromkeys(
        ["query", "local", "extra", "context", "chain", "out", "grad_out", "grad_query", "grad_context"], "*bf16:16"
    )
    pointers |= dict.fromkeys(["sinks", "lse", "delta", "grad_chain"], "*fp32:16")
    pointers |= {"start": "*i64:16", "length": "*i64:16", "chosen": "*i64:16"}
    types = {f"{name}_ptr": kind for name, kind in pointers.items()}
    types |= dict.fromkeys(["S", "X", "E", "rate", "own_window"], "i32") | {"scale": "fp32", "H": "i32:16"}
    types |= dict.fromkeys(["query_stride_b", "query_stride_s", "query_stride_h", "extra_stride", "window"], "i32:16")

    def on_each(kernel: Any, blocks: str, label: str = "", spill: str = "", **fixed: Any) -> list[Launch]:
        found = []
        for target, chosen in BLOCKS[blocks].items():
            sized = constants(chosen, shapes.head_width) | fixed
            sized = {name: value for name, value in sized.items() if name in kernel.arg_names}
            rows = sized["BLOCK_N" if kernel is sink_attention_key_backward_kernel else "BLOCK_H"]
            found.append(
                Launch(
                    kernel=kernel,
                    label=label,
                    arguments={name: types[name] for name in kernel.arg_names if name not in sized},
                    constants=sized,
                    options=chosen.options(),
                    spill=spill,
                    target=target,
                    instruction=TENSOR_CORES.get(target, "") if rows == 64 else "",
                )
            )
        return found

    forward = sink_attention_forward_kernel
    hca = {"EXTRA": CLOSED.value, "CACHED": True, "chosen_ptr": None, "start_ptr": None}
    csa = {"EXTRA": CHOSEN.value, "CACHED": True, "start_ptr": None}
    return [
        *on_each(forward, "forward", "rollout", EXTRA=CHAIN.value, CACHED=False, chosen_ptr=None, length_ptr=None),
        *on_each(forward, "forward", "HCA", **hca),
        *on_each(forward, "forward", "CSA", **csa),
        *on_each(forward, "forward", "CSA verify", **csa, BLOCK_H=16),
        *on_each(sink_attention_chain_backward_kernel, "chain_backward", EXTRA=CHAIN.value),
        *on_each(sink_attention_query_backward_kernel, "query_backward", EXTRA=CHAIN.value),
        *on_each(sink_attention_key_backward_kernel, "key_backward", spill="in front of its loop and after it"),
    ]
