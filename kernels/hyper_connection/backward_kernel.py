"""The Triton functions of `connect`'s backward; see `kernel.py`."""

# T tokens, N streams (padded to P), D model width, M = N * (N + 2), G groups of tokens

# Tuples grow while Triton unrolls a loop.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernel import softmax_of_entries


@triton.jit
def hyper_connection_map_backward_kernel(
    streams_ptr,  # [T, N, D]
    base_ptr,  # [M]
    scale_ptr,  # [3]
    mix_ptr,  # [T, M]
    inverse_ptr,  # [T]
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
    """Write the gradients of the projections of one token.

    Sinkhorn runs again for the sums by which its steps divide: going backwards, each matrix is the next one times them.
    """
    M: tl.constexpr = N * (N + 2)
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    is_stream, matrix, is_entry = n < N, n[:, None] * N + n[None, :], (n < N)[:, None] & (n < N)[None, :]
    products = tl.zeros((P, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        mask = is_stream[:, None] & (at < D)[None, :]
        streams = tl.load(streams_ptr + (token * N + n[:, None]) * D + at[None, :], mask=mask, other=0.0)
        grad_collapsed = tl.load(grad_collapsed_ptr + token * D + at, mask=at < D, other=0.0)
        products += streams.to(tl.float32) * grad_collapsed.to(tl.float32)[None, :]

    pre_mix = tl.load(mix_ptr + token * M + n, mask=is_stream, other=0.0)
    post_mix = tl.load(mix_ptr + token * M + N + n, mask=is_stream, other=0.0)
    comb_mix = tl.load(mix_ptr + token * M + 2 * N + matrix, mask=is_entry, other=0.0)
    pre_scale, post_scale, comb_scale = tl.load(scale_ptr), tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
    pre = tl.sigmoid(pre_mix * pre_scale + tl.load(base_ptr + n, mask=is_stream, other=0.0))
    post = tl.sigmoid(post_mix * post_scale + tl.load(base_ptr + N + n, mask=is_stream, other=0.0))
    tl.store(pre_ptr + token * N + n, pre + eps, mask=is_stream)
    grad_pre = tl.sum(products, 1) * pre * (1 - pre)
    grad_post = tl.load(grad_post_ptr + token * N + n, mask=is_stream, other=0.0) * 2 * post * (1 - post)

    grad_comb = tl.load(grad_comb_ptr + token * N * N + matrix, mask=is_entry, other=0.0)
    comb = comb_mix * comb_scale + tl.load(base_ptr + 2 * N + matrix, mask=is_entry, other=0.0)
    comb = softmax_of_entries(comb, is_entry, eps)
    sums = ()
    for step in tl.static_range(1, STEPS):
        total = tl.expand_dims(tl.sum(comb, (step + 1) % 2) + eps, (step + 1) % 2)
        comb = comb / total
        sums += (total,)
    for back in tl.static_range(1, STEPS):
        total = sums[STEPS - 1 - back]
        grad_comb = (grad_comb - tl.sum(grad_comb * comb, (STEPS - back + 1) % 2, keep_dims=True)) / total
        comb = comb * total
    softmax = tl.where(is_entry, comb - eps, 0.0)
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
    streams_ptr,  # [T, N, D]
    fn_ptr,  # [M, N, D]
    grad_sums_ptr,  # [T, M]
    pre_ptr,  # [T, N]
    pull_ptr,  # [T]
    grad_collapsed_ptr,  # [T, D]
    grad_passed_ptr,  # [T, N, D]
    grad_streams_ptr,  # [T, N, D]
    grad_fn_ptr,  # [G, M, N, D], one part for every group of tokens; or None
    T,
    D,
    group_size,  # tokens, a multiple of BLOCK_T
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of the streams and of the projection, for some channels of all streams and a token group."""
    M: tl.constexpr = N * (N + 2)
    n, channel = tl.arange(0, P), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column, weight = tl.arange(0, P * BLOCK_D), tl.arange(0, BLOCK_M)
    stream, channel_of_column = column // BLOCK_D, tl.program_id(0) * BLOCK_D + column % BLOCK_D
    at = (stream * D + channel_of_column)[None, :]
    is_column, is_weight = ((stream < N) & (channel_of_column < D))[None, :], weight < M
    fn_offset, fn_mask = weight[:, None] * N * D + at, is_weight[:, None] & is_column
    fn = tl.load(fn_ptr + fn_offset, mask=fn_mask, other=0.0).to(tl.float32)
    grad_fn = tl.zeros((BLOCK_M, P * BLOCK_D), tl.float32)
    group = tl.program_id(1)
    for begin in range(group * group_size, tl.minimum((group + 1) * group_size, T), BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        row, is_token = token.to(tl.int64)[:, None], (token < T)[:, None]
        mask, sums_mask = is_token & is_column, is_token & is_weight[None, :]
        grad_sums = tl.load(grad_sums_ptr + row * M + weight[None, :], mask=sums_mask, other=0.0)
        streams = tl.load(streams_ptr + row * N * D + at, mask=mask, other=0.0).to(tl.float32)
        grad_passed = tl.load(grad_passed_ptr + row * N * D + at, mask=mask, other=0.0).to(tl.float32)
        pull = tl.load(pull_ptr + token, mask=token < T, other=0.0)[:, None]
        pre = tl.load(pre_ptr + row * N + n[None, :], mask=is_token & (n < N)[None, :], other=0.0)
        collapsed_mask = is_token & (channel < D)[None, :]
        grad_collapsed = tl.load(grad_collapsed_ptr + row * D + channel[None, :], mask=collapsed_mask, other=0.0)
        spread = pre[:, :, None] * grad_collapsed.to(tl.float32)[:, None, :]
        grad = tl.reshape(spread, (BLOCK_T, P * BLOCK_D)) + pull * streams + grad_passed
        grad = tl.dot(grad_sums, fn, grad, input_precision=PRECISION)
        tl.store(grad_streams_ptr + row * N * D + at, grad.to(grad_streams_ptr.dtype.element_ty), mask=mask)
        if grad_fn_ptr is not None:
            grad_fn = tl.dot(tl.trans(grad_sums), streams, grad_fn, input_precision=PRECISION)
    if grad_fn_ptr is not None:
        tl.store(grad_fn_ptr + group.to(tl.int64) * M * N * D + fn_offset, grad_fn, mask=fn_mask)
