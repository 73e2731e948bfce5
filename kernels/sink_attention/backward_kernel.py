"""The Triton functions of the backward; see `kernel.py`."""

# B rows, S anchors, H heads, C head width, E chain keys, G blocks of heads

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import CHAIN, dot, load_rows, store_rows


@triton.jit
def _weights(query, key, grad_out, lse, delta, seen, scale):
    """[heads, keys]: p, and dz times `scale`."""
    score = dot(query, tl.trans(key)) * scale
    weight = tl.where(seen[None, :], tl.exp(score - lse[:, None]), 0.0)
    grad_weight = dot(grad_out, tl.trans(key))
    return weight, weight * (grad_weight - delta[:, None]) * scale


@triton.jit
def sink_attention_chain_backward_kernel(
    query_ptr,  # [B, S, H, C] with strides
    chain_ptr,  # [B, S, E, C]
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    grad_out_ptr,  # [B, S, H, C]
    delta_ptr,  # [B, S, H]
    grad_chain_ptr,  # [B, S, G, E, C]
    scale,
    H,
    S,
    E,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Delta of every query and head, and the gradient of the chain where there is one."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    grad_out = load_rows(grad_out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
    out = load_rows(out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + token * H + head, delta, mask=head < H)
    if EXTRA == CHAIN:
        query_ptr += token // S * query_stride_b + token % S * query_stride_s
        query = load_rows(query_ptr, head, query_stride_h, head < H, C, BLOCK_C)
        lse = tl.load(lse_ptr + token * H + head, mask=head < H, other=float("inf"))
        for begin in range(0, E, BLOCK_N):
            at = begin + tl.arange(0, BLOCK_N)
            key = load_rows(chain_ptr + token * E * C, at, C, at < E, C, BLOCK_C)
            weight, grad_score = _weights(query, key, grad_out, lse, delta, at < E, scale)
            grad_key = dot(tl.trans(grad_score).to(key.dtype), query)
            grad_key = dot(tl.trans(weight).to(key.dtype), grad_out, grad_key)
            grad_ptr = grad_chain_ptr + (token * tl.num_programs(1) + group) * E * C
            store_rows(grad_ptr, at, C, at < E, grad_key, C, BLOCK_C)


@triton.jit
def sink_attention_query_backward_kernel(
    query_ptr,  # [B, S, H, C] with strides
    context_ptr,  # [B, S, C]
    chain_ptr,  # [B, S, E, C]
    start_ptr,  # [B, S]
    lse_ptr,  # [B, S, H]
    grad_out_ptr,  # [B, S, H, C]
    delta_ptr,  # [B, S, H]
    grad_query_ptr,  # [B, S, H, C]
    scale,
    H,
    S,
    E,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    window,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of one query, a block of its heads."""
    token = tl.program_id(0).to(tl.int64)
    row, anchor = token // S, (token % S).to(tl.int32)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    query_ptr += row * query_stride_b + anchor * query_stride_s
    query = load_rows(query_ptr, head, query_stride_h, head < H, C, BLOCK_C)
    grad_out = load_rows(grad_out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
    lse = tl.load(lse_ptr + token * H + head, mask=head < H, other=float("inf"))
    delta = tl.load(delta_ptr + token * H + head, mask=head < H, other=0.0)
    grad_query = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)

    own_window = window
    if EXTRA == CHAIN:
        own_window -= E
    first = tl.maximum(anchor - own_window + 1, tl.load(start_ptr + token).to(tl.int32))
    for begin in range(first, anchor + 1, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        key = load_rows(context_ptr + row * S * C, at, C, at <= anchor, C, BLOCK_C)
        _, grad_score = _weights(query, key, grad_out, lse, delta, at <= anchor, scale)
        grad_query = dot(grad_score.to(key.dtype), key, grad_query)
    if EXTRA == CHAIN:
        for begin in range(0, E, BLOCK_N):
            at = begin + tl.arange(0, BLOCK_N)
            key = load_rows(chain_ptr + token * E * C, at, C, at < E, C, BLOCK_C)
            _, grad_score = _weights(query, key, grad_out, lse, delta, at < E, scale)
            grad_query = dot(grad_score.to(key.dtype), key, grad_query)
    store_rows(grad_query_ptr + token * H * C, head, C, head < H, grad_query, C, BLOCK_C)


@triton.jit
def sink_attention_key_backward_kernel(
    query_ptr,  # [B, S, H, C] with strides
    context_ptr,  # [B, S, C]
    start_ptr,  # [B, S]
    lse_ptr,  # [B, S, H]
    delta_ptr,  # [B, S, H]
    grad_out_ptr,  # [B, S, H, C]
    grad_context_ptr,  # [B, S, C]
    scale,
    H,
    S,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    own_window,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of a block of base-step keys."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = load_rows(context_ptr + row * S * C, at, C, at < S, C, BLOCK_C)
    grad_key = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    begin = tl.program_id(0) * BLOCK_N
    for anchor in range(begin, tl.minimum(begin + BLOCK_N - 1 + own_window, S)):
        token = row * S + anchor
        first = tl.maximum(anchor - own_window + 1, tl.load(start_ptr + token).to(tl.int32))
        seen = (at >= first) & (at <= anchor)
        for group in range(0, H, BLOCK_H):
            head = group + tl.arange(0, BLOCK_H)
            query = load_rows(
                query_ptr + row * query_stride_b + anchor * query_stride_s, head, query_stride_h, head < H, C, BLOCK_C
            )
            grad_out = load_rows(grad_out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
            lse = tl.load(lse_ptr + token * H + head, mask=head < H, other=float("inf"))
            delta = tl.load(delta_ptr + token * H + head, mask=head < H, other=0.0)
            weight, grad_score = _weights(query, key, grad_out, lse, delta, seen & (at < S), scale)
            grad_key = dot(tl.trans(grad_score).to(key.dtype), query, grad_key)
            grad_key = dot(tl.trans(weight).to(key.dtype), grad_out, grad_key)
    store_rows(grad_context_ptr + row * S * C, at, C, at < S, grad_key, C, BLOCK_C)
