"""The Triton functions of `connect`'s forward; see `kernel.py`."""

# T tokens, N streams (padded to P), D model width, X = N * D, M = N * (N + 2), Q parts of X

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_product(streams, weights, total, PRECISION: tl.constexpr):
    """Return `total + streams @ weights`, about as exact as in float32.

    Streams of bfloat16 need no splitting: with three parts of the float32 weights they take three products.
    """
    if streams.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)
        rest = weights - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        if PRECISION == "ieee":  # the interpreter of Triton 3.9 multiplies the bits of bfloat16 as integers
            streams = streams.to(tl.float32)
            high, middle, low = high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
        total = tl.dot(streams, low, total, input_precision=PRECISION)
        total = tl.dot(streams, middle, total, input_precision=PRECISION)
        total = tl.dot(streams, high, total, input_precision=PRECISION)
    else:
        total = tl.dot(streams.to(tl.float32), weights, total, input_precision=PRECISION)
    return total


@triton.jit
def hyper_connection_project_kernel(
    streams_ptr,  # [T, X]
    fn_ptr,  # [M, X]
    sums_ptr,  # [Q, T, M + 1]: parts of y, and of the sum of squares
    T,
    X,
    part_size,
    M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write parts of y, and of the sum of squares for r."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part, weight = tl.program_id(1), tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)[:, None]
    product = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    for begin in range(part * part_size, tl.minimum((part + 1) * part_size, X), BLOCK_X):
        at = begin + tl.arange(0, BLOCK_X)
        inside = (at < X)[None, :]
        streams = tl.load(streams_ptr + row * X + at[None, :], mask=(token < T)[:, None] & inside, other=0.0)
        fn = tl.load(fn_ptr + weight[:, None] * X + at[None, :], mask=(weight < M)[:, None] & inside, other=0.0)
        product = _add_product(streams, tl.trans(fn.to(tl.float32)), product, PRECISION)
        streams = streams.to(tl.float32)
        square += tl.sum(streams * streams, 1)
    sums_ptr += part.to(tl.int64) * T * (M + 1)
    tl.store(sums_ptr + row * (M + 1) + weight[None, :], product, mask=(token < T)[:, None] & (weight < M)[None, :])
    tl.store(sums_ptr + token.to(tl.int64) * (M + 1) + M, square, mask=token < T)


@triton.jit
def softmax_of_entries(comb, is_entry, eps):
    """Return the softmax of each row plus eps; 0 in the padding."""
    comb = tl.where(is_entry, comb, float("-inf"))
    comb = tl.exp(comb - tl.maximum(tl.max(comb, 1), -3.0e38)[:, None])  # a padded row holds only -inf
    return tl.where(is_entry, comb / tl.maximum(tl.sum(comb, 1), 1.0)[:, None] + eps, 0.0)


@triton.jit
def hyper_connection_map_kernel(
    streams_ptr,  # [T, N, D]
    sums_ptr,  # [Q, T, M + 1]
    base_ptr,  # [M]
    scale_ptr,  # [3]
    post_ptr,  # [T, N]
    comb_ptr,  # [T, N, N]
    collapsed_ptr,  # [T, D]
    mix_ptr,  # [T, M]
    inverse_ptr,  # [T], 1 / rms
    T,
    D,
    Q,
    norm_eps,
    eps,
    part_size,  # channels
    N: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the weights of one token, and a part of its collapsed streams."""
    M: tl.constexpr = N * (N + 2)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, P)
    is_stream, matrix, is_entry = n < N, n[:, None] * N + n[None, :], (n < N)[:, None] & (n < N)[None, :]
    square = 0.0
    pre, post = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    comb = tl.zeros((P, P), tl.float32)
    for q in range(Q):
        row_ptr = sums_ptr + (q * T + token) * (M + 1)
        square += tl.load(row_ptr + M)
        pre += tl.load(row_ptr + n, mask=is_stream, other=0.0)
        post += tl.load(row_ptr + N + n, mask=is_stream, other=0.0)
        comb += tl.load(row_ptr + 2 * N + matrix, mask=is_entry, other=0.0)
    inverse = 1 / tl.sqrt(square / (N * D) + norm_eps)
    pre, post, comb = pre * inverse, post * inverse, comb * inverse
    if part == 0:
        tl.store(inverse_ptr + token, inverse)
        tl.store(mix_ptr + token * M + n, pre, mask=is_stream)
        tl.store(mix_ptr + token * M + N + n, post, mask=is_stream)
        tl.store(mix_ptr + token * M + 2 * N + matrix, comb, mask=is_entry)
        post = post * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + n, mask=is_stream, other=0.0)
        tl.store(post_ptr + token * N + n, 2 * tl.sigmoid(post), mask=is_stream)
        comb = comb * tl.load(scale_ptr + 2) + tl.load(base_ptr + 2 * N + matrix, mask=is_entry, other=0.0)
        comb = softmax_of_entries(comb, is_entry, eps)
        for step in range(1, STEPS):
            if step % 2 == 1:  # noqa: SIM108
                comb = comb / (tl.sum(comb, 0) + eps)[None, :]
            else:
                comb = comb / (tl.sum(comb, 1) + eps)[:, None]
        tl.store(comb_ptr + token * N * N + matrix, comb, mask=is_entry)

    pre = pre * tl.load(scale_ptr) + tl.load(base_ptr + n, mask=is_stream, other=0.0)
    pre = tl.where(is_stream, tl.sigmoid(pre) + eps, 0.0)
    for begin in range(part * part_size, tl.minimum((part + 1) * part_size, D), BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        mask = is_stream[:, None] & (at < D)[None, :]
        streams = tl.load(streams_ptr + (token * N + n[:, None]) * D + at[None, :], mask=mask, other=0.0)
        collapsed = tl.sum(pre[:, None] * streams.to(tl.float32), 0)
        tl.store(collapsed_ptr + token * D + at, collapsed.to(collapsed_ptr.dtype.element_ty), mask=at < D)
