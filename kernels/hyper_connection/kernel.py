"""Triton for `connect`: two launches forward; two, and some sums, backward.

With y = streams @ fn^T, r = 1 / rms(streams), mix = r y, and dlin the gradient of `scale mix + base`, the gradients are

    dmix = scale dlin       dfn = (r dmix)^T @ streams, a part from every group of tokens
    dstreams = pre dcollapsed + (r dmix) @ fn - (r^2 / X) (dmix . mix) streams
    dpre_n = dcollapsed . streams_n
    a division by sums, c' = c / s with s = sum c + eps:    dc = (dc' - sum dc' c') / s

Nothing is added atomically.
"""

# T tokens, N streams (padded to P), D model width, X = N * D, M = N * (N + 2), Q parts of X

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import INTERPRETER
from ..launch import MODELS, Launch
from .backward_kernel import hyper_connection_map_backward_kernel, hyper_connection_streams_backward_kernel
from .expand_kernel import KERNELS, OPTIONS, row_blocks
from .forward_kernel import hyper_connection_map_kernel, hyper_connection_project_kernel
from .reference import Connection

BLOCK_TOKENS = 16  # of the matrix products, as the channels below; not measured on a GPU
BLOCK_CHANNELS = 128
# What a program of the streams' backward takes of a token, and how many programs there are: more hide more latency, but
# every group of tokens writes its part of dfn. Not measured on a GPU.
BACKWARD_BYTES, BACKWARD_PROGRAMS = 256, 1024
PROJECT_CHANNELS, PROJECT_OPTIONS = 64, OPTIONS | {"num_warps": 8}  # with the others' sizes the projection spills
# Products of float32 in parts of bfloat16:
# about as exact as float32, and on every target (not in the interpreter).
PRECISION = "ieee" if os.environ.get(INTERPRETER) == "1" else "bf16x6"


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams_BSND: Tensor,
        fn_MX: Tensor,
        base_M: Tensor,
        scale_3: Tensor,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, ...]:
        streams_BSND, fn_MX = streams_BSND.contiguous(), fn_MX.contiguous()
        *shape, num_streams, width = streams_BSND.shape
        tokens, (num_weights, size) = math.prod(shape), fn_MX.shape
        groups = triton.cdiv(tokens, BLOCK_TOKENS)
        part_size = _part_size(groups, size)
        parts = triton.cdiv(size, part_size)
        new = partial(torch.empty, dtype=torch.float32, device=streams_BSND.device)
        sums, mix, inverse = new(parts, tokens, num_weights + 1), new(tokens, num_weights), new(tokens)
        steps = new(tokens, 2 * iterations, num_streams, num_streams) if any(ctx.needs_input_grad) else None
        post, comb = new(*shape, num_streams), new(*shape, num_streams, num_streams)
        collapsed = streams_BSND.new_empty(*shape, width)
        hyper_connection_project_kernel[(groups, parts)](
            streams_BSND,
            fn_MX,
            sums,
            tokens,
            size,
            part_size,
            M=num_weights,
            **_blocks(num_weights, size, PROJECT_CHANNELS),
            **PROJECT_OPTIONS,
        )
        results = (post, comb, collapsed, mix, inverse, steps)
        numbers = (tokens, width, parts, norm_eps, eps)
        rows = row_blocks(num_streams, width)
        hyper_connection_map_kernel[(tokens,)](
            streams_BSND, sums, base_M, scale_3, *results, *numbers, STEPS=2 * iterations, **rows
        )
        ctx.save_for_backward(streams_BSND, fn_MX, base_M, scale_3, mix, inverse, steps)
        ctx.eps = eps
        return post, comb, collapsed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn_MX, base_M, scale_3, mix, inverse, steps = ctx.saved_tensors
        (tokens, num_streams, width), (num_weights, size) = streams.flatten(0, -3).shape, fn_MX.shape
        grads = tuple(grad.contiguous() for grad in grads)
        grad_lin, grad_sums = torch.empty_like(mix), torch.empty_like(mix)
        pre, pull = mix.new_empty(tokens, num_streams), torch.empty_like(inverse)
        saved, results = (base_M, scale_3, mix, inverse, steps), (grad_lin, grad_sums, pre, pull)
        rows = row_blocks(num_streams, width)
        hyper_connection_map_backward_kernel[(tokens,)](
            streams, *saved, *grads, *results, width, ctx.eps, STEPS=steps.shape[1], **rows
        )
        grad_streams = torch.empty_like(streams)
        blocks = _column_blocks(num_streams, width, num_weights, streams.dtype)
        columns, group_size = triton.cdiv(width, blocks["BLOCK_D"]), _group_size(tokens, width, blocks["BLOCK_D"])
        groups = triton.cdiv(tokens, group_size)
        parts_GMX = mix.new_empty(groups, num_weights, size) if ctx.needs_input_grad[1] else None
        tensors = (streams, fn_MX, grad_sums, pre, pull, grads[2], grad_streams, parts_GMX)
        hyper_connection_streams_backward_kernel[(columns, groups)](
            *tensors, tokens, width, group_size, **blocks, **OPTIONS
        )
        grad_fn = None if parts_GMX is None else parts_GMX.sum(0).to(fn_MX.dtype)
        sizes = [num_streams, num_streams, num_streams**2]
        grad_scale_3 = torch.stack([part.sum() for part in (grad_lin * mix).sum(0).split(sizes)])
        grad_base_M = grad_lin.sum(0)
        return grad_streams, grad_fn, grad_base_M.to(base_M.dtype), grad_scale_3.to(scale_3.dtype), None, None, None


def connect_triton(
    streams_BSND: Tensor,
    fn_MX: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> Connection:
    """`connect_reference`."""
    return Connection(*_Connect.apply(streams_BSND, fn_MX, base_M, scale_3, norm_eps, eps, iterations))


def _part_size(groups: int, size: int) -> int:
    """Channels of a part: few tokens share the streams' channels out among more programs."""
    parts = min(triton.cdiv(256, groups), triton.cdiv(size, 8 * PROJECT_CHANNELS))
    return triton.cdiv(triton.cdiv(size, parts), PROJECT_CHANNELS) * PROJECT_CHANNELS


def _group_size(tokens: int, width: int, block_d: int) -> int:
    """Tokens of a program of the streams' backward, of which there are about `BACKWARD_PROGRAMS`."""
    groups = max(1, BACKWARD_PROGRAMS // triton.cdiv(width, block_d))
    return triton.cdiv(triton.cdiv(tokens, groups), BLOCK_TOKENS) * BLOCK_TOKENS


def _column_blocks(num_streams: int, width: int, num_weights: int, dtype: torch.dtype) -> dict[str, Any]:
    padded = triton.next_power_of_2(num_streams)
    block_d = max(16, min(BACKWARD_BYTES // dtype.itemsize // padded, triton.next_power_of_2(width)))
    # TF32 is exact for bfloat16 and errs by 2^-10 where the gradient of bfloat16 streams is rounded by 2^-9.
    precision = "tf32" if dtype is torch.bfloat16 and PRECISION != "ieee" else PRECISION
    blocks = {"BLOCK_T": BLOCK_TOKENS, "BLOCK_M": _padded_weights(num_weights), "BLOCK_D": block_d}
    return {"N": num_streams, "P": padded, "PRECISION": precision, **blocks}


def _padded_weights(num_weights: int) -> int:
    return max(16, triton.next_power_of_2(num_weights))


def _blocks(num_weights: int, size: int, channels: int = BLOCK_CHANNELS) -> dict[str, Any]:
    block_x = min(channels, max(16, triton.next_power_of_2(size)))
    block_m = _padded_weights(num_weights)
    return {"BLOCK_T": BLOCK_TOKENS, "BLOCK_M": block_m, "BLOCK_X": block_x, "PRECISION": PRECISION}


def launches() -> list[Launch]:
    """What is compiled ahead of time; the width is an argument, so one serves V4-Flash and V4-Pro."""
    num_streams = MODELS["V4-Flash"].streams
    constants = row_blocks(num_streams, 4096) | _blocks(num_streams * (num_streams + 2), num_streams * 4096)
    constants |= {"M": num_streams * (num_streams + 2), "STEPS": 40}
    columns = _column_blocks(num_streams, 4096, constants["M"], torch.bfloat16)
    types = dict.fromkeys(["T", "Q"], "i32") | dict.fromkeys(["D", "X", "part_size", "group_size"], "i32:16")
    types |= dict.fromkeys(["norm_eps", "eps"], "fp32")
    wide = ["streams", "collapsed", "output", "new"]
    types |= {f"{grad}{name}_ptr": "*bf16:16" for name in wide for grad in ("", "grad_")}

    def launch(kernel: Any, options: dict[str, Any] = OPTIONS, label: str = "", **others: Any) -> Launch:
        fixed = {name: value for name, value in {**constants, **others}.items() if name in kernel.arg_names}
        arguments = {name: types.get(name, "*fp32:16") for name in kernel.arg_names if name not in fixed}
        return Launch(kernel=kernel, label=label, arguments=arguments, constants=fixed, options=options)

    streams_backward = partial(launch, hyper_connection_streams_backward_kernel, **columns)
    return [
        launch(hyper_connection_project_kernel, PROJECT_OPTIONS, BLOCK_X=PROJECT_CHANNELS),
        launch(hyper_connection_map_kernel),
        launch(hyper_connection_map_backward_kernel),
        streams_backward(),
        streams_backward(label="frozen fn", grad_fn_ptr=None),
        *(launch(kernel) for kernel in KERNELS),
    ]
