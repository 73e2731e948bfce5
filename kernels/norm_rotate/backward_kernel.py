"""The Triton function of the norm's backward; see `kernel.py`."""

# L, M, N leading sizes of the rows, C channels, E of them plain (not rotated), r rotated channel pairs, Q programs

# Tuples grow while Triton unrolls a loop.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import first_row, inverse_rms, load_pairs, load_row, store_pairs, store_plain


@triton.jit
def norm_rotate_backward_kernel(
    x_ptr,  # [L, M, N, C]
    turn_ptr,  # [L, M, N, r, 2]
    weight_ptr,  # [C], or None
    grad_out_ptr,  # [L, M, N, C]
    grad_x_ptr,  # [L, M, N, C]
    parts_ptr,  # [Q, C], of the weight's gradient, or None
    eps,
    M,
    N,
    num_blocks,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    turn_stride_0,
    turn_stride_1,
    turn_stride_2,
    grad_out_stride_0,
    grad_out_stride_1,
    grad_out_stride_2,
    grad_x_stride_0,
    grad_x_stride_1,
    grad_x_stride_2,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write the gradient of some blocks of rows, and their part of the weight's gradient."""
    E: tl.constexpr = C - 2 * PAIRS
    sums = tl.zeros((BLOCK_E,), tl.float32)  # of the weight's gradient
    sums_even, sums_odd = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    begin = tl.program_id(0) * BLOCKS
    for block in range(begin, tl.minimum(begin + BLOCKS, num_blocks)):
        i, j, first = first_row(block, M, N, ROWS)
        x_at, turn_at = i * x_stride_0 + j * x_stride_1, i * turn_stride_0 + j * turn_stride_1
        grad_out_at, grad_x_at = (
            i * grad_out_stride_0 + j * grad_out_stride_1,
            i * grad_x_stride_0 + j * grad_x_stride_1,
        )
        values, grads, turns = (), (), ()  # all rows are read before the first is written
        for number in tl.static_range(ROWS):
            row = (first + number).to(tl.int64)
            values += (load_row(x_ptr + x_at + row * x_stride_2, row < N, E, PAIRS, BLOCK_E, BLOCK_P),)
            grad_ptr = grad_out_ptr + grad_out_at + row * grad_out_stride_2
            grads += (load_row(grad_ptr, row < N, E, PAIRS, BLOCK_E, BLOCK_P),)
            turns += (load_pairs(turn_ptr + turn_at + row * turn_stride_2, row < N, PAIRS, BLOCK_P),)
        if weight_ptr is not None:  # read for every block, or its registers spill
            weight, weight_even, weight_odd = load_row(weight_ptr, True, E, PAIRS, BLOCK_E, BLOCK_P)
        for number in tl.static_range(ROWS):
            row = (first + number).to(tl.int64)
            plain, even, odd = values[number]
            grad, real, imag = grads[number]
            cos, sin = turns[number]
            grad_even, grad_odd = real * cos + imag * sin, imag * cos - real * sin
            inverse = inverse_rms(plain, even, odd, eps, C)
            plain, even, odd = plain * inverse, even * inverse, odd * inverse
            if parts_ptr is not None:
                sums += grad * plain
                sums_even += grad_even * even
                sums_odd += grad_odd * odd
            if weight_ptr is not None:
                grad, grad_even, grad_odd = grad * weight, grad_even * weight_even, grad_odd * weight_odd
            pull = (tl.sum(grad * plain) + tl.sum(grad_even * even + grad_odd * odd)) / C
            to_ptr = grad_x_ptr + grad_x_at + row * grad_x_stride_2
            store_plain(to_ptr, row < N, (grad - plain * pull) * inverse, E, BLOCK_E)
            grad_even, grad_odd = (grad_even - even * pull) * inverse, (grad_odd - odd * pull) * inverse
            store_pairs(to_ptr + E, row < N, grad_even, grad_odd, PAIRS, BLOCK_P)
    if parts_ptr is not None:
        part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * C
        store_plain(part_ptr, True, sums, E, BLOCK_E)
        store_pairs(part_ptr + E, True, sums_even, sums_odd, PAIRS, BLOCK_P)
