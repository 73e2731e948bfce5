"""Triton for `expand_and_mix`: one launch each way.

With dnew the gradient of the streams after the sublayer, the gradients are

    dpost_n = dnew_n . output               doutput = sum_n post_n dnew_n
    dcomb_jk = streams_j . dnew_k           dstreams_j = sum_k comb_jk dnew_k
"""

# T tokens, N streams, D model width

# Tuples grow while Triton unrolls a loop.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..device import on_its_device

# A program is one warp with one token: it exchanges only the sums at the end, and even few tokens make many programs.
# Not measured on a GPU.
OPTIONS = {"num_warps": 1, "num_stages": 2, "enable_fp_fusion": True}
EXPAND_CHANNELS, EXPAND_BACKWARD_CHANNELS = 512, 128  # at once; backward keeps N * (N + 1) sums of each


@triton.jit
def hyper_connection_expand_kernel(
    post_ptr,  # [T, N]
    comb_ptr,  # [T, N, N]
    output_ptr,  # [T, D]
    streams_ptr,  # [T, N, D]
    new_ptr,  # [T, N, D]
    D,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the new streams of one token, for a block of their channels."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask, offset = at < D, token * N * D + at
    output = tl.load(output_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
    streams = ()
    for j in tl.static_range(N):
        streams += (tl.load(streams_ptr + offset + j * D, mask=mask, other=0.0).to(tl.float32),)
    for k in tl.static_range(N):
        new = tl.load(post_ptr + token * N + k) * output
        for j in tl.static_range(N):
            new += tl.load(comb_ptr + (token * N + j) * N + k) * streams[j]
        tl.store(new_ptr + offset + k * D, new.to(new_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hyper_connection_expand_backward_kernel(
    post_ptr,  # [T, N]
    comb_ptr,  # [T, N, N]
    output_ptr,  # [T, D]
    streams_ptr,  # [T, N, D]
    grad_new_ptr,  # [T, N, D]
    grad_post_ptr,  # [T, N]
    grad_comb_ptr,  # [T, N, N]
    grad_output_ptr,  # [T, D]
    grad_streams_ptr,  # [T, N, D]
    D,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write all gradients of one token."""
    token = tl.program_id(0).to(tl.int64)
    weights, sums = (), ()  # N of post, then N * N of comb
    for k in tl.static_range(N):
        weights += (tl.load(post_ptr + token * N + k),)
    for jk in tl.static_range(N * N):
        weights += (tl.load(comb_ptr + token * N * N + jk),)
    for _ in tl.static_range(N * (N + 1)):
        sums += (tl.zeros((BLOCK_D,), tl.float32),)
    for begin in tl.range(0, D, BLOCK_D, num_stages=3):  # makes loads asynchronous although there is no product
        at = begin + tl.arange(0, BLOCK_D)
        mask, offset = at < D, token * N * D + at
        output = tl.load(output_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
        grad_output = tl.zeros((BLOCK_D,), tl.float32)
        grad_new, added = (), ()
        for k in tl.static_range(N):
            grad = tl.load(grad_new_ptr + offset + k * D, mask=mask, other=0.0).to(tl.float32)
            grad_output += weights[k] * grad
            grad_new += (grad,)
            added += (sums[k] + grad * output,)
        tl.store(grad_output_ptr + token * D + at, grad_output.to(grad_output_ptr.dtype.element_ty), mask=mask)
        for j in tl.static_range(N):
            streams = tl.load(streams_ptr + offset + j * D, mask=mask, other=0.0).to(tl.float32)
            grad = tl.zeros((BLOCK_D,), tl.float32)
            for k in tl.static_range(N):
                grad += weights[N + j * N + k] * grad_new[k]
                added += (sums[N + j * N + k] + streams * grad_new[k],)
            tl.store(grad_streams_ptr + offset + j * D, grad.to(grad_streams_ptr.dtype.element_ty), mask=mask)
        sums = added
    for k in tl.static_range(N):
        tl.store(grad_post_ptr + token * N + k, tl.sum(sums[k]))
    for jk in tl.static_range(N * N):
        tl.store(grad_comb_ptr + token * N * N + jk, tl.sum(sums[N + jk]))


class _ExpandAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
        inputs = [x.contiguous() for x in (post_BSN, comb_BSNN, output_BSD, streams_BSND)]
        ctx.save_for_backward(*inputs)
        new_BSND = torch.empty_like(inputs[3])
        num_streams, width = new_BSND.shape[2:]
        blocks = row_blocks(width, EXPAND_CHANNELS)
        grid = (post_BSN.shape[:2].numel(), triton.cdiv(width, blocks["BLOCK_D"]))
        hyper_connection_expand_kernel[grid](*inputs, new_BSND, width, N=num_streams, **blocks)
        return new_BSND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new_BSND: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in inputs)
        num_streams, width = grad_new_BSND.shape[2:]
        hyper_connection_expand_backward_kernel[(inputs[0].shape[:2].numel(),)](
            *inputs,
            grad_new_BSND.contiguous(),
            *grads,
            width,
            N=num_streams,
            **row_blocks(width, EXPAND_BACKWARD_CHANNELS),
        )
        return grads


@on_its_device
def expand_and_mix_triton(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """Return `expand_and_mix_reference`, summed in float32."""
    new_BSND: Tensor = _ExpandAndMix.apply(post_BSN, comb_BSNN, output_BSD, streams_BSND)
    return new_BSND


def row_blocks(width: int, channels: int) -> dict[str, Any]:
    """Return the constants and options of a kernel whose programs take one token each."""
    return {"BLOCK_D": min(channels, triton.next_power_of_2(width))} | OPTIONS
