"""The Triton function of the forward, and the functions that the backward shares with it; see `kernel.py`.

Rows are vectors, not a matrix: sums over a row are then scalars, and its rotated channels, which lie in other threads
than the plain ones, take them without an exchange through shared memory.
"""

# L, M, N leading sizes of the rows, C channels, E of them plain (not rotated), r rotated channel pairs

# Tuples grow while Triton unrolls a loop.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_row(block, M, N, ROWS: tl.constexpr):
    """Return the two outer indices of a block of rows, and the inner index of its first row."""
    blocks = tl.cdiv(N, ROWS)
    outer = block // blocks
    return (outer // M).to(tl.int64), (outer % M).to(tl.int64), (block % blocks) * ROWS


@triton.jit
def load_pairs(pointer, exists, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the even and the odd members of r pairs, [r] each, as float32; zero where absent."""
    channel = tl.arange(0, 2 * BLOCK_P)
    values = tl.load(pointer + channel, mask=(channel < 2 * PAIRS) & exists, other=0.0)
    return tl.split(tl.reshape(values.to(tl.float32), (BLOCK_P, 2)))


@triton.jit
def load_row(pointer, exists, E: tl.constexpr, PAIRS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the plain channels, [E], and the pairs of a row, as float32; zero where absent."""
    channel = tl.arange(0, BLOCK_E)
    plain = tl.load(pointer + channel, mask=(channel < E) & exists, other=0.0).to(tl.float32)
    even, odd = load_pairs(pointer + E, exists, PAIRS, BLOCK_P)
    return plain, even, odd


@triton.jit
def store_pairs(pointer, exists, even, odd, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store r pairs; the counterpart of `load_pairs`."""
    channel = tl.arange(0, 2 * BLOCK_P)
    values = tl.reshape(tl.join(even, odd), (2 * BLOCK_P,)).to(pointer.dtype.element_ty)
    tl.store(pointer + channel, values, mask=(channel < 2 * PAIRS) & exists)


@triton.jit
def store_plain(pointer, exists, plain, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store plain channels."""
    channel = tl.arange(0, BLOCK_E)
    tl.store(pointer + channel, plain.to(pointer.dtype.element_ty), mask=(channel < E) & exists)


@triton.jit
def inverse_rms(plain, even, odd, eps, C: tl.constexpr):
    """Return 1 / rms of a row."""
    square = tl.sum(plain * plain) + tl.sum(even * even + odd * odd)
    return 1.0 / tl.sqrt(square / C + eps)


@triton.jit
def norm_rotate_forward_kernel(
    x_ptr,  # [L, M, N, C]
    turn_ptr,  # [L, M, N, r, 2]
    weight_ptr,  # [C], or None
    out_ptr,  # [L, M, N, C]
    eps,
    M,
    N,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    turn_stride_0,
    turn_stride_1,
    turn_stride_2,
    out_stride_0,
    out_stride_1,
    out_stride_2,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write a block of rows, normed and rotated; without IS_NORMED, only the rotated channels, in place."""
    E: tl.constexpr = C - 2 * PAIRS
    i, j, first = first_row(tl.program_id(0), M, N, ROWS)
    x_ptr += i * x_stride_0 + j * x_stride_1
    turn_ptr += i * turn_stride_0 + j * turn_stride_1
    out_ptr += i * out_stride_0 + j * out_stride_1
    values, turns = (), ()  # all rows are read before the first is written
    for number in tl.static_range(ROWS):
        row = (first + number).to(tl.int64)
        if IS_NORMED:
            values += (load_row(x_ptr + row * x_stride_2, row < N, E, PAIRS, BLOCK_E, BLOCK_P),)
        else:
            values += (load_pairs(x_ptr + row * x_stride_2 + E, row < N, PAIRS, BLOCK_P),)
        turns += (load_pairs(turn_ptr + row * turn_stride_2, row < N, PAIRS, BLOCK_P),)
    if weight_ptr is not None:
        weight, weight_even, weight_odd = load_row(weight_ptr, True, E, PAIRS, BLOCK_E, BLOCK_P)
    for number in tl.static_range(ROWS):
        row = (first + number).to(tl.int64)
        to_ptr = out_ptr + row * out_stride_2
        if IS_NORMED:
            plain, even, odd = values[number]
            inverse = inverse_rms(plain, even, odd, eps, C)
            plain, even, odd = plain * inverse, even * inverse, odd * inverse
            if weight_ptr is not None:
                plain, even, odd = plain * weight, even * weight_even, odd * weight_odd
            # The definition rounds here, too.
            even = even.to(out_ptr.dtype.element_ty).to(tl.float32)
            odd = odd.to(out_ptr.dtype.element_ty).to(tl.float32)
            store_plain(to_ptr, row < N, plain, E, BLOCK_E)
        else:
            even, odd = values[number]
        cos, sin = turns[number]
        store_pairs(to_ptr + E, row < N, even * cos - odd * sin, even * sin + odd * cos, PAIRS, BLOCK_P)
