"""The Triton functions of `connect`'s forward; see `kernel.py`."""

# T tokens, N streams (padded to P), D model width, X = N * D, M = N * (N + 2), Q parts of X

from __future__ import annotations

import triton
import triton.language as tl


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
    """Parts of y, and of the sum of squares that r is made of."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part, weight = tl.program_id(1), tl.arange(0, BLOCK_M)
    row = token.to(tl.int64)[:, None]
    product = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    for begin in range(part * part_size, tl.minimum((part + 1) * part_size, X), BLOCK_X):
        at = begin + tl.arange(0, BLOCK_X)
        inside = (at < X)[None, :]
        streams = tl.load(streams_ptr + row * X + at[None, :], mask=(token < T)[:, None] & inside, other=0.0)
        streams = streams.to(tl.float32)
        fn = tl.load(fn_ptr + weight[:, None] * X + at[None, :], mask=(weight < M)[:, None] & inside, other=0.0)
        product = tl.dot(streams, tl.trans(fn.to(tl.float32)), product, input_precision=PRECISION)
        square += tl.sum(streams * streams, 1)
    sums_ptr += part.to(tl.int64) * T * (M + 1)
    tl.store(sums_ptr + row * (M + 1) + weight[None, :], product, mask=(token < T)[:, None] & (weight < M)[None, :])
    tl.store(sums_ptr + token.to(tl.int64) * (M + 1) + M, square, mask=token < T)


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
    steps_ptr,  # [T, STEPS, N, N], every matrix of Sinkhorn from the softmax on, for the backward; or None
    T,
    D,
    Q,
    norm_eps,
    eps,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weights of one token, and its streams collapsed."""
    M: tl.constexpr = N * (N + 2)
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    is_stream, matrix, is_entry = n < N, n[:, None] * N + n[None, :], (n < N)[:, None] & (n < N)[None, :]
    square = 0.0
    pre, post = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    comb = tl.zeros((P, P), tl.float32)
    for part in range(Q):
        row_ptr = sums_ptr + (part * T + token) * (M + 1)
        square += tl.load(row_ptr + M)
        pre += tl.load(row_ptr + n, mask=is_stream, other=0.0)
        post += tl.load(row_ptr + N + n, mask=is_stream, other=0.0)
        comb += tl.load(row_ptr + 2 * N + matrix, mask=is_entry, other=0.0)
    inverse = 1 / tl.sqrt(square / (N * D) + norm_eps)
    pre, post, comb = pre * inverse, post * inverse, comb * inverse
    tl.store(inverse_ptr + token, inverse)
    tl.store(mix_ptr + token * M + n, pre, mask=is_stream)
    tl.store(mix_ptr + token * M + N + n, post, mask=is_stream)
    tl.store(mix_ptr + token * M + 2 * N + matrix, comb, mask=is_entry)

    pre = pre * tl.load(scale_ptr) + tl.load(base_ptr + n, mask=is_stream, other=0.0)
    post = post * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + n, mask=is_stream, other=0.0)
    comb = comb * tl.load(scale_ptr + 2) + tl.load(base_ptr + 2 * N + matrix, mask=is_entry, other=0.0)
    tl.store(post_ptr + token * N + n, 2 * tl.sigmoid(post), mask=is_stream)
    comb = tl.where(is_entry, comb, float("-inf"))
    comb = tl.exp(comb - tl.maximum(tl.max(comb, 1), -3.0e38)[:, None])  # a padded row holds -inf alone
    comb = tl.where(is_entry, comb / tl.maximum(tl.sum(comb, 1), 1.0)[:, None] + eps, 0.0)
    if steps_ptr is not None:
        steps_ptr += token * STEPS * N * N
        tl.store(steps_ptr + matrix, comb, mask=is_entry)
    for step in range(1, STEPS):
        if step % 2 == 1:  # noqa: SIM108
            comb = comb / (tl.sum(comb, 0) + eps)[None, :]
        else:
            comb = comb / (tl.sum(comb, 1) + eps)[:, None]
        if steps_ptr is not None:
            tl.store(steps_ptr + step * N * N + matrix, comb, mask=is_entry)
    tl.store(comb_ptr + token * N * N + matrix, comb, mask=is_entry)

    pre = tl.where(is_stream, tl.sigmoid(pre) + eps, 0.0)
    for begin in range(0, D, BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        mask = is_stream[:, None] & (at < D)[None, :]
        streams = tl.load(streams_ptr + (token * N + n[:, None]) * D + at[None, :], mask=mask, other=0.0)
        collapsed = tl.sum(pre[:, None] * streams.to(tl.float32), 0)
        tl.store(collapsed_ptr + token * D + at, collapsed.to(collapsed_ptr.dtype.element_ty), mask=at < D)
