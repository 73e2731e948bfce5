"""The Triton functions of the backward; see `kernel.py`."""

# B rows, S anchors, H heads, C head width, E chain keys, G blocks of heads, r rotated channel pairs

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import CHAIN, dot, load_keys, load_rows, rotate_rows, store_rows


@triton.jit
def _load_pairs(query_ptr, grad_ptr, token, group, H, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return [2 heads, C]: of each head the query, then the gradient. One product with twice the rows serves both."""
    row, channel = tl.arange(0, 2 * BLOCK_H)[:, None], tl.arange(0, BLOCK_C)[None, :]
    head = group * BLOCK_H + row // 2
    offset = head * C + channel
    pointer = tl.where(row % 2 == 0, query_ptr + token * H * C + offset, grad_ptr + token * H * C + offset)
    return tl.load(pointer, mask=(head < H) & (channel < C), other=0.0)


@triton.jit
def _load_sums(lse_ptr, delta_ptr, group, H, BLOCK_H: tl.constexpr):
    """Return log-sum-exp and delta of each head; a padded head gives no weight to any key."""
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    lse = tl.load(lse_ptr + head, mask=head < H, other=float("inf"))
    return lse, tl.load(delta_ptr + head, mask=head < H, other=0.0)


@triton.jit
def _key_weights(key, pairs, lse, delta, seen, scale, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return dz * scale and p of each head, [keys, 2 heads]; their product with `pairs` is the gradient of the keys."""
    score, grad_weight = tl.split(tl.reshape(dot(key, tl.trans(pairs)), (BLOCK_N, BLOCK_H, 2)))
    weight = tl.where(seen[:, None], tl.exp(score * scale - lse[None, :]), 0.0)
    grad_score = weight * (grad_weight - delta[None, :]) * scale
    return tl.reshape(tl.join(grad_score, weight), (BLOCK_N, 2 * BLOCK_H)).to(key.dtype)


@triton.jit
def sink_attention_chain_backward_kernel(
    query_ptr,  # [B, S, H, C]
    chain_ptr,  # [B, S, E, C]
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    turn_ptr,  # [B, S, r, 2] with a batch stride
    grad_out_ptr,  # [B, S, H, C], of the output that is rotated back
    delta_ptr,  # [B, S, H]
    grad_ptr,  # [B, S, H, C], of the output before it is rotated back
    grad_chain_ptr,  # [B, S, G, E, C]
    scale,
    H,
    S,
    E,
    turn_stride_b,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write delta and the rotated gradient of every query and head, and the gradient of the chain, if any."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    grad_out = load_rows(grad_out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
    out = load_rows(out_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)  # a rotation of both changes no product
    tl.store(delta_ptr + token * H + head, delta, mask=head < H)
    turn_ptr += token // S * turn_stride_b + token % S * 2 * PAIRS
    grad = rotate_rows(grad_out.to(tl.float32), turn_ptr, False, BLOCK_H, C, PAIRS, BLOCK_C).to(grad_out.dtype)
    store_rows(grad_ptr + token * H * C, head, C, head < H, grad, C, BLOCK_C)
    if EXTRA == CHAIN:
        query = load_rows(query_ptr + token * H * C, head, C, head < H, C, BLOCK_C)
        pairs = tl.reshape(tl.permute(tl.join(query, grad), (0, 2, 1)), (2 * BLOCK_H, BLOCK_C))
        lse = tl.load(lse_ptr + token * H + head, mask=head < H, other=float("inf"))
        grad_chain_ptr += (token * tl.num_programs(1) + group) * E * C
        for begin in range(0, E, BLOCK_N):
            at = begin + tl.arange(0, BLOCK_N)
            key = load_rows(chain_ptr + token * E * C, at, C, at < E, C, BLOCK_C)
            weight = _key_weights(key, pairs, lse, delta, at < E, scale, BLOCK_H, BLOCK_N)
            store_rows(grad_chain_ptr, at, C, at < E, dot(weight, pairs), C, BLOCK_C)


@triton.jit
def sink_attention_query_backward_kernel(
    query_ptr,  # [B, S, H, C]
    context_ptr,  # [B, S, C]
    chain_ptr,  # [B, S, E, C]
    start_ptr,  # [B, S]
    lse_ptr,  # [B, S, H]
    grad_ptr,  # [B, S, H, C]
    delta_ptr,  # [B, S, H]
    grad_query_ptr,  # [B, S, H, C]
    scale,
    H,
    S,
    E,
    window,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradient of one query for a block of its heads."""
    token = tl.program_id(0).to(tl.int64)
    row, anchor = token // S, (token % S).to(tl.int32)
    group = tl.program_id(1)
    pairs = _load_pairs(query_ptr, grad_ptr, token, group, H, C, BLOCK_H, BLOCK_C)
    lse, delta = _load_sums(lse_ptr + token * H, delta_ptr + token * H, group, H, BLOCK_H)
    grad_query = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)

    first = tl.maximum(anchor - window + E + 1, tl.load(start_ptr + token).to(tl.int32))
    num_local = anchor + 1 - first
    context_ptr += row * S * C
    if EXTRA == CHAIN:
        chain_ptr += token * E * C
    tl.assume(num_local + E > 0)  # or ptxas lets every wgmma wait for the one before it
    for begin in range(0, num_local + E, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        extra = at - num_local
        is_extra = (extra >= 0) & (extra < E)
        key, seen = load_keys(context_ptr, first + at, num_local, chain_ptr, extra, is_extra, at, C, EXTRA, BLOCK_C)
        both = tl.reshape(dot(pairs, tl.trans(key)), (BLOCK_H, 2, BLOCK_N))
        score, grad_weight = tl.split(tl.permute(both, (0, 2, 1)))
        weight = tl.where(seen[None, :], tl.exp(score * scale - lse[:, None]), 0.0)
        grad_score = weight * (grad_weight - delta[:, None]) * scale
        grad_query = dot(grad_score.to(key.dtype), key, grad_query)
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    store_rows(grad_query_ptr + token * H * C, head, C, head < H, grad_query, C, BLOCK_C)


@triton.jit
def sink_attention_key_backward_kernel(
    query_ptr,  # [B, S, H, C]
    context_ptr,  # [B, S, C]
    start_ptr,  # [B, S]
    lse_ptr,  # [B, S, H]
    delta_ptr,  # [B, S, H]
    grad_ptr,  # [B, S, H, C]
    grad_context_ptr,  # [B, S, C]
    scale,
    H,
    S,
    local_window,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradient of a block of base-step keys."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = load_rows(context_ptr + row * S * C, at, C, at < S, C, BLOCK_C)
    grad_key = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    begin = tl.program_id(0) * BLOCK_N
    groups = tl.cdiv(H, BLOCK_H)
    end = tl.minimum(begin + BLOCK_N - 1 + local_window, S) * groups
    tl.assume(begin * groups < end)  # as above
    for step in range(begin * groups, end):
        anchor = step // groups
        token = row * S + anchor
        first = tl.maximum(anchor - local_window + 1, tl.load(start_ptr + token).to(tl.int32))
        seen = (at >= first) & (at <= anchor)
        group = step % groups
        pairs = _load_pairs(query_ptr, grad_ptr, token, group, H, C, BLOCK_H, BLOCK_C)
        lse, delta = _load_sums(lse_ptr + token * H, delta_ptr + token * H, group, H, BLOCK_H)
        weight = tl.zeros((BLOCK_N, 2 * BLOCK_H), key.dtype)
        if step < end:  # always true, see the forward kernel
            weight = _key_weights(key, pairs, lse, delta, seen, scale, BLOCK_H, BLOCK_N)
        grad_key = dot(weight, pairs, grad_key)
    store_rows(grad_context_ptr + row * S * C, at, C, at < S, grad_key, C, BLOCK_C)
