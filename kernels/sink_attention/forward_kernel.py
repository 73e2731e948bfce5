"""The Triton function of the forward, and the functions that the backward shares with it; see `kernel.py`."""

# B rows, S queries, X local keys, W compressed entries, H heads, C head width, E further keys, r rotated channel pairs

from __future__ import annotations

import os

import triton
import triton.language as tl

# The further keys of a query, after those of its window: none, its chain, the compressed entries that are complete
# (HCA), or the complete entries chosen for it (CSA).
NONE, CHAIN, CLOSED, CHOSEN = (tl.constexpr(number) for number in range(4))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, added=None):
    """Return left @ right, summed in float32, plus `added`."""
    if INTERPRETED:  # the interpreter of Triton 3.9 multiplies the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, added, input_precision="ieee")


@triton.jit
def load_rows(pointer, row, row_stride, mask, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load [rows, C] from a tensor with a contiguous last dimension; zero where masked."""
    channel = tl.arange(0, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    return tl.load(pointer + offset, mask=mask[:, None] & (channel < C)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, row, row_stride, mask, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store [rows, C]; the counterpart of `load_rows`."""
    channel = tl.arange(0, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), mask=mask[:, None] & (channel < C)[None, :])


@triton.jit
def rotate_rows(
    values,
    turn_ptr,
    IS_BACK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return float32 [rows, C] with the last r channel pairs turned by [r, 2], or turned back; C is even."""
    pair = tl.arange(0, BLOCK_C // 2) - (C // 2 - PAIRS)
    is_rotated = (pair >= 0) & (pair < PAIRS)
    cos = tl.load(turn_ptr + 2 * pair, mask=is_rotated, other=1.0)[None, :]
    sin = tl.load(turn_ptr + 2 * pair + 1, mask=is_rotated, other=0.0)[None, :]
    if IS_BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(values, (ROWS, BLOCK_C // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK_C))


@triton.jit
def load_keys(
    local_ptr,  # of the query's row
    slot,  # [keys], index of each local key
    num_local,
    extra_ptr,  # of the query's row; CHAIN: of the query itself
    extra,  # [keys], index of each further key
    is_extra,  # [keys]
    at,  # [keys]: local keys are 0..num_local - 1
    C: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load [keys, C], and return which of them exist: one block takes local and further keys, so few lie idle."""
    channel = tl.arange(0, BLOCK_C)[None, :]
    seen = at < num_local
    pointer = local_ptr + (slot[:, None] * C + channel)
    if EXTRA != NONE:
        pointer = tl.where(seen[:, None], pointer, extra_ptr + (extra[:, None] * C + channel))
        seen |= is_extra
    return tl.load(pointer, mask=seen[:, None] & (channel < C), other=0.0), seen


@triton.jit
def sink_attention_forward_kernel(
    query_ptr,  # [B, S, H, C] with strides
    local_ptr,  # [B, X, C]: slots 0..X - 1; CACHED: a ring of X - S slots, then the S new keys
    extra_ptr,  # CHAIN: [B, S, E, C]; else [B, W, C] with a batch stride
    chosen_ptr,  # CHOSEN: int [B, S, E], negative past the number of chosen entries
    sinks_ptr,  # [H]
    start_ptr,  # unless CACHED: [B, S], first slot of the query's document
    length_ptr,  # CACHED: [B], number of positions before the new keys
    turn_ptr,  # [B, S, r, 2] with a batch stride, rotation of the queries; None: the output is not rotated back
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
    turn_stride_b,
    window,
    rate,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    EXTRA: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write output and log-sum-exp of one query for a block of its heads."""
    token = tl.program_id(0).to(tl.int64)
    row, slot_of_query = token // S, token % S
    position = slot_of_query.to(tl.int32)
    if turn_ptr is not None:
        turn_ptr += row * turn_stride_b + position * 2 * PAIRS
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    query_ptr += row * query_stride_b + slot_of_query * query_stride_s  # 128 heads of 512 pass 2^31 at slot 32,768
    query = load_rows(query_ptr, head, query_stride_h, head < H, C, BLOCK_C)
    largest = tl.load(sinks_ptr + head, mask=head < H, other=0.0).to(tl.float32)
    total = tl.where(largest == float("-inf"), 0.0, 1.0)
    weighted = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)

    num_extra = 0
    if CACHED:
        length = tl.load(length_ptr + row).to(tl.int32)
        position += length
        first = tl.maximum(position - window + 1, 0)
    else:
        first = tl.maximum(position - window + E + 1, tl.load(start_ptr + token).to(tl.int32))
    ring = X - S
    first_held = first % tl.maximum(ring, 1)
    num_local = position + 1 - first
    num_closed = (position + 1) // rate
    local_ptr += row * X * C
    if EXTRA != NONE:
        extra_ptr += (token if EXTRA == CHAIN else row) * extra_stride
        num_extra = tl.minimum(num_closed, E) if EXTRA == CLOSED else E

    for begin in range(0, num_local + num_extra, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        slot, extra = first + at, at - num_local
        if CACHED:
            held = first_held + at
            held = tl.where(held < ring, held, held - ring)
            slot = tl.where(slot < length, held, ring + slot - length)
        is_extra = (extra >= 0) & (extra < num_extra)
        if EXTRA == CHOSEN:
            extra = tl.load(chosen_ptr + token * E + extra, mask=is_extra, other=-1).to(tl.int32)
            is_extra = (extra >= 0) & (extra < num_closed)
        key, seen = load_keys(local_ptr, slot, num_local, extra_ptr, extra, is_extra, at, C, EXTRA, BLOCK_C)
        weight, shrink = tl.zeros((BLOCK_H, BLOCK_N), key.dtype), tl.full((BLOCK_H,), 1.0, tl.float32)
        # Always true. If it can see that one product feeds another, Triton 3.9 lets each of the two warp groups of
        # sm_90 compute all scores instead of half of them.
        if begin < num_local + num_extra:
            score = tl.where(seen[None, :], dot(query, tl.trans(key)) * scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(score, 1))
            level = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # -inf - -inf would be NaN
            exact = tl.exp(score - level[:, None])
            shrink = tl.exp(largest - level)
            total, largest = total * shrink + tl.sum(exact, 1), new_largest
            weight = exact.to(key.dtype)
        weighted = dot(weight, key, weighted * shrink[:, None])

    out = weighted / total[:, None]
    if turn_ptr is not None:
        out = out.to(out_ptr.dtype.element_ty).to(tl.float32)  # the definition rounds here, too
        out = rotate_rows(out, turn_ptr, True, BLOCK_H, C, PAIRS, BLOCK_C)
    store_rows(out_ptr + token * H * C, head, C, head < H, out, C, BLOCK_C)
    tl.store(lse_ptr + token * H + head, largest + tl.log(total), mask=head < H)
