"""Triton for `expand_and_mix`: one launch each way.

With dnew the gradient of the streams after the sublayer, the gradients are

    dpost_n = dnew_n . output               doutput = sum_n post_n dnew_n
    dcomb_jk = streams_j . dnew_k           dstreams_j = sum_k comb_jk dnew_k
"""

# T tokens, N streams (padded to P), D model width

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_WIDTH = 512  # channels of all streams at once; not measured on a GPU
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def hyper_connection_expand_kernel(
    post_ptr,  # [T, N]
    comb_ptr,  # [T, N, N]
    output_ptr,  # [T, D]
    streams_ptr,  # [T, N, D]
    new_ptr,  # [T, N, D]
    D,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """New streams of one token, a block of their channels."""
    token = tl.program_id(0).to(tl.int64)
    n, at = tl.arange(0, P), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_entry, mask = (n < N)[:, None] & (n < N)[None, :], (n < N)[:, None] & (at < D)[None, :]
    place = (token * N + n[:, None]) * D + at[None, :]
    post = tl.load(post_ptr + token * N + n, mask=n < N, other=0.0)
    comb = tl.load(comb_ptr + token * N * N + n[:, None] * N + n[None, :], mask=is_entry, other=0.0)
    output = tl.load(output_ptr + token * D + at, mask=at < D, other=0.0).to(tl.float32)
    streams = tl.load(streams_ptr + place, mask=mask, other=0.0).to(tl.float32)
    new = post[:, None] * output[None, :] + tl.sum(comb[:, :, None] * streams[:, None, :], 0)
    tl.store(new_ptr + place, new.to(new_ptr.dtype.element_ty), mask=mask)


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
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    matrix, is_entry = n[:, None] * N + n[None, :], (n < N)[:, None] & (n < N)[None, :]
    post = tl.load(post_ptr + token * N + n, mask=n < N, other=0.0)
    comb = tl.load(comb_ptr + token * N * N + matrix, mask=is_entry, other=0.0)
    grad_post, grad_comb = tl.zeros((P,), tl.float32), tl.zeros((P, P), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        mask, place = (n < N)[:, None] & (at < D)[None, :], (token * N + n[:, None]) * D + at[None, :]
        output = tl.load(output_ptr + token * D + at, mask=at < D, other=0.0).to(tl.float32)
        streams = tl.load(streams_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad_new = tl.load(grad_new_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad_post += tl.sum(grad_new * output[None, :], 1)
        grad_comb += tl.sum(streams[:, None, :] * grad_new[None, :, :], 2)
        grad_output = tl.sum(post[:, None] * grad_new, 0)
        tl.store(grad_output_ptr + token * D + at, grad_output.to(grad_output_ptr.dtype.element_ty), mask=at < D)
        grad_streams = tl.sum(comb[:, :, None] * grad_new[None, :, :], 1)
        tl.store(grad_streams_ptr + place, grad_streams.to(grad_streams_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_post_ptr + token * N + n, grad_post, mask=n < N)
    tl.store(grad_comb_ptr + token * N * N + matrix, grad_comb, mask=is_entry)


class _ExpandAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
        inputs = [x.contiguous() for x in (post_BSN, comb_BSNN, output_BSD, streams_BSND)]
        ctx.save_for_backward(*inputs)
        new_BSND = torch.empty_like(inputs[3])
        rows = row_blocks(*new_BSND.shape[2:])
        grid = (post_BSN.shape[:2].numel(), triton.cdiv(new_BSND.shape[3], rows["BLOCK_D"]))
        hyper_connection_expand_kernel[grid](*inputs, new_BSND, new_BSND.shape[3], **rows)
        return new_BSND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new_BSND: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in inputs)
        hyper_connection_expand_backward_kernel[(inputs[0].shape[:2].numel(),)](
            *inputs, grad_new_BSND.contiguous(), *grads, grad_new_BSND.shape[3], **row_blocks(*grad_new_BSND.shape[2:])
        )
        return grads


def expand_and_mix_triton(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """`expand_and_mix_reference`, summed in float32."""
    new_BSND: Tensor = _ExpandAndMix.apply(post_BSN, comb_BSNN, output_BSD, streams_BSND)
    return new_BSND


def row_blocks(num_streams: int, width: int) -> dict[str, int]:
    """Constants of a kernel whose programs take one token."""
    block_d = min(BLOCK_WIDTH, triton.next_power_of_2(width))
    return {"N": num_streams, "P": triton.next_power_of_2(num_streams), "BLOCK_D": block_d} | OPTIONS


KERNELS = [hyper_connection_expand_kernel, hyper_connection_expand_backward_kernel]  # compiled ahead of time
