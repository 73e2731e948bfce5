"""The Triton functions of `connect`'s backward; see `kernel.py`."""

# T tokens, N streams (padded to P), D model width, X = N * D, M = N * (N + 2), Q parts of X

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hyper_connection_map_backward_kernel(
    streams_ptr,  # [T, N, D]
    base_ptr,  # [M]
    scale_ptr,  # [3]
    mix_ptr,  # [T, M]
    inverse_ptr,  # [T]
    steps_ptr,  # [T, STEPS, N, N]
    grad_post_ptr,  # [T, N]
    grad_comb_ptr,  # [T, N, N]
    grad_collapsed_ptr,  # [T, D]
    grad_lin_ptr,  # [T, M]
    grad_sums_ptr,  # [T, M], r dmix
    pre_ptr,  # [T, N]
    pull_ptr,  # [T], the factor of the streams in their own gradient
    D,
    eps,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the projections of one token."""
    M: tl.constexpr = N * (N + 2)
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    is_stream, matrix, is_entry = n < N, n[:, None] * N + n[None, :], (n < N)[:, None] & (n < N)[None, :]
    grad_pre = tl.zeros((P,), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        mask = is_stream[:, None] & (at < D)[None, :]
        streams = tl.load(streams_ptr + (token * N + n[:, None]) * D + at[None, :], mask=mask, other=0.0)
        grad_collapsed = tl.load(grad_collapsed_ptr + token * D + at, mask=at < D, other=0.0)
        grad_pre += tl.sum(streams.to(tl.float32) * grad_collapsed.to(tl.float32)[None, :], 1)

    pre_mix = tl.load(mix_ptr + token * M + n, mask=is_stream, other=0.0)
    post_mix = tl.load(mix_ptr + token * M + N + n, mask=is_stream, other=0.0)
    comb_mix = tl.load(mix_ptr + token * M + 2 * N + matrix, mask=is_entry, other=0.0)
    pre_scale, post_scale, comb_scale = tl.load(scale_ptr), tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
    pre = tl.sigmoid(pre_mix * pre_scale + tl.load(base_ptr + n, mask=is_stream, other=0.0))
    post = tl.sigmoid(post_mix * post_scale + tl.load(base_ptr + N + n, mask=is_stream, other=0.0))
    tl.store(pre_ptr + token * N + n, pre + eps, mask=is_stream)
    grad_pre = grad_pre * pre * (1 - pre)
    grad_post = tl.load(grad_post_ptr + token * N + n, mask=is_stream, other=0.0) * 2 * post * (1 - post)

    grad_comb = tl.load(grad_comb_ptr + token * N * N + matrix, mask=is_entry, other=0.0)
    steps_ptr += token * STEPS * N * N
    after = tl.load(steps_ptr + (STEPS - 1) * N * N + matrix, mask=is_entry, other=0.0)
    for back in range(1, STEPS):
        step = STEPS - back
        before = tl.load(steps_ptr + (step - 1) * N * N + matrix, mask=is_entry, other=0.0)
        if step % 2 == 1:
            grad_comb = (grad_comb - tl.sum(grad_comb * after, 0)[None, :]) / (tl.sum(before, 0) + eps)[None, :]
        else:
            grad_comb = (grad_comb - tl.sum(grad_comb * after, 1)[:, None]) / (tl.sum(before, 1) + eps)[:, None]
        grad_comb = tl.where(is_entry, grad_comb, 0.0)
        after = before
    softmax = tl.where(is_entry, after - eps, 0.0)
    grad_comb = softmax * (grad_comb - tl.sum(grad_comb * softmax, 1)[:, None])

    tl.store(grad_lin_ptr + token * M + n, grad_pre, mask=is_stream)
    tl.store(grad_lin_ptr + token * M + N + n, grad_post, mask=is_stream)
    tl.store(grad_lin_ptr + token * M + 2 * N + matrix, grad_comb, mask=is_entry)
    inverse = tl.load(inverse_ptr + token)
    grad_pre, grad_post, grad_comb = grad_pre * pre_scale, grad_post * post_scale, grad_comb * comb_scale
    tl.store(grad_sums_ptr + token * M + n, grad_pre * inverse, mask=is_stream)
    tl.store(grad_sums_ptr + token * M + N + n, grad_post * inverse, mask=is_stream)
    tl.store(grad_sums_ptr + token * M + 2 * N + matrix, grad_comb * inverse, mask=is_entry)
    along = tl.sum(grad_pre * pre_mix) + tl.sum(grad_post * post_mix) + tl.sum(tl.sum(grad_comb * comb_mix, 1))
    tl.store(pull_ptr + token, -along * inverse * inverse / (N * D))


@triton.jit
def hyper_connection_streams_backward_kernel(
    streams_ptr,  # [T, X]
    fn_ptr,  # [M, X]
    grad_sums_ptr,  # [T, M]
    pre_ptr,  # [T, N]
    pull_ptr,  # [T]
    grad_collapsed_ptr,  # [T, D]
    grad_streams_ptr,  # [T, X]
    T,
    D,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the streams."""
    M: tl.constexpr = N * (N + 2)
    X = N * D
    token, weight = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    row, is_token = token.to(tl.int64)[:, None], (token < T)[:, None]
    at = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask, stream, channel = is_token & (at < X)[None, :], (at // D)[None, :], (at % D)[None, :]
    grad_sums = tl.load(grad_sums_ptr + row * M + weight[None, :], mask=is_token & (weight < M)[None, :], other=0.0)
    fn_mask = (weight < M)[:, None] & (at < X)[None, :]
    fn = tl.load(fn_ptr + weight[:, None] * X + at[None, :], mask=fn_mask, other=0.0).to(tl.float32)
    grad = tl.dot(grad_sums, fn, input_precision=PRECISION)
    streams = tl.load(streams_ptr + row * X + at[None, :], mask=mask, other=0.0).to(tl.float32)
    grad += tl.load(pull_ptr + token, mask=token < T, other=0.0)[:, None] * streams
    pre = tl.load(pre_ptr + row * N + stream, mask=mask, other=0.0)
    grad += pre * tl.load(grad_collapsed_ptr + row * D + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_streams_ptr + row * X + at[None, :], grad.to(grad_streams_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hyper_connection_fn_backward_kernel(
    streams_ptr,  # [T, X]
    grad_sums_ptr,  # [T, M]
    grad_fn_ptr,  # [M, X]
    T,
    X,
    M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the projection, a block of its columns."""
    weight, at = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    grad = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    for begin in range(0, T, BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        row, is_token = token.to(tl.int64)[:, None], (token < T)[:, None]
        sums_mask = is_token & (weight < M)[None, :]
        grad_sums = tl.load(grad_sums_ptr + row * M + weight[None, :], mask=sums_mask, other=0.0)
        streams = tl.load(streams_ptr + row * X + at[None, :], mask=is_token & (at < X)[None, :], other=0.0)
        grad = tl.dot(tl.trans(grad_sums), streams.to(tl.float32), grad, input_precision=PRECISION)
    mask = (weight < M)[:, None] & (at < X)[None, :]
    tl.store(grad_fn_ptr + weight[:, None] * X + at[None, :], grad.to(grad_fn_ptr.dtype.element_ty), mask=mask)
