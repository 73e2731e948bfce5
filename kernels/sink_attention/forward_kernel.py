"""The Triton function of the forward, and what the backward shares with it; see `kernel.py`."""

# B rows, S queries, X local keys, W compressed entries, H heads, C head width, E further keys

from __future__ import annotations

import os

import triton
import triton.language as tl

# The further keys of a query, after those of its window: none, its own chain, the entries whose windows are closed
# (HCA), or those entries that were chosen for it (CSA).
NONE, CHAIN, CLOSED, CHOSEN = (tl.constexpr(number) for number in range(4))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, added=None):
    """Their product, summed in float32, plus `added`."""
    if INTERPRETED:  # the interpreter of Triton 3.9 multiplies the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, added, input_precision="ieee")


@triton.jit
def load_rows(pointer, row, row_stride, mask, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[rows, C] where the last dimension is contiguous; zero where masked."""
    channel = tl.arange(0, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    return tl.load(pointer + offset, mask=mask[:, None] & (channel < C)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, row, row_stride, mask, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Counterpart of `load_rows`."""
    channel = tl.arange(0, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), mask=mask[:, None] & (channel < C)[None, :])


@triton.jit
def _absorb(query, key, seen, scale, total, largest, weighted):
    """One more block of keys into a running softmax: its sum, its largest score and its weighted sum of keys."""
    score = dot(query, tl.trans(key)) * scale
    score = tl.where(seen[None, :], score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, 1))
    level = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # -inf - -inf would be no number
    weight = tl.exp(score - level[:, None])
    shrink = tl.exp(largest - level)
    weighted = weighted * shrink[:, None] + dot(weight.to(key.dtype), key)
    return total * shrink + tl.sum(weight, 1), new_largest, weighted


@triton.jit
def sink_attention_forward_kernel(
    query_ptr,  # [B, S, H, C] with strides
    local_ptr,  # [B, X, C]: slots 0..X - 1, or, CACHED, a ring of X - S slots and the S new keys
    extra_ptr,  # CHAIN: [B, S, E, C]; else [B, W, C] with a batch stride
    chosen_ptr,  # CHOSEN: int [B, S, E], negative where fewer than E are seen
    sinks_ptr,  # [H]
    start_ptr,  # [B, S], first slot of the query's document; unless CACHED
    length_ptr,  # [B], positions before the new keys; CACHED
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    scale,
    H,
    S,
    X,
    E,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    extra_stride,
    window,
    rate,
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output and log-sum-exp of one query, a block of its heads."""
    token = tl.program_id(0).to(tl.int64)
    row, position = token // S, (token % S).to(tl.int32)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    query_ptr += row * query_stride_b + position * query_stride_s
    query = load_rows(query_ptr, head, query_stride_h, head < H, C, BLOCK_C)
    largest = tl.load(sinks_ptr + head, mask=head < H, other=0.0).to(tl.float32)
    total = tl.where(largest == float("-inf"), 0.0, 1.0)
    weighted = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)

    own_window = window
    if EXTRA == CHAIN:
        own_window -= E
    length = 0
    if CACHED:
        length = tl.load(length_ptr + row).to(tl.int32)
        position += length
        first = tl.maximum(position - own_window + 1, 0)
    else:
        first = tl.maximum(position - own_window + 1, tl.load(start_ptr + token).to(tl.int32))
    local_ptr += row * X * C
    for begin in range(first, position + 1, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        place = at
        if CACHED:
            place = tl.where(at < length, at % tl.maximum(X - S, 1), X - S + at - length)
        key = load_rows(local_ptr, place, C, at <= position, C, BLOCK_C)
        total, largest, weighted = _absorb(query, key, at <= position, scale, total, largest, weighted)

    if EXTRA != NONE:
        count = E
        if EXTRA == CHAIN:
            extra_ptr += token * extra_stride
        else:
            extra_ptr += row * extra_stride
        if EXTRA == CLOSED:
            count = tl.minimum((position + 1) // rate, E)
        for begin in range(0, count, BLOCK_N):
            at = begin + tl.arange(0, BLOCK_N)
            place, seen = at, at < count
            if EXTRA == CHOSEN:
                place = tl.load(chosen_ptr + token * E + at, mask=seen, other=-1).to(tl.int32)
                seen = (place >= 0) & (place < (position + 1) // rate)
            key = load_rows(extra_ptr, place, C, seen, C, BLOCK_C)
            total, largest, weighted = _absorb(query, key, seen, scale, total, largest, weighted)

    store_rows(out_ptr + token * H * C, head, C, head < H, weighted / total[:, None], C, BLOCK_C)
    tl.store(lse_ptr + token * H + head, largest + tl.log(total), mask=head < H)
