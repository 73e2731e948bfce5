"""Triton for `connect`: two launches forward; two launches and some sums backward.

With y = streams @ fn^T, r = 1 / rms(streams), mix = r y, dlin the gradient of `scale mix + base`, and dpassed the
gradient of the streams passed on to `expand_and_mix`, the gradients are

    dmix = scale dlin       dfn = (r dmix)^T @ streams, one part for every group of tokens
    dstreams = dpassed + pre dcollapsed + (r dmix) @ fn - (r^2 / X) (dmix . mix) streams
    dpre_n = dcollapsed . streams_n
    a division by sums, c' = c / s with s = sum c + eps:    dc = (dc' - sum dc' c') / s

There are no atomic additions.
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

from ..device import on_its_device
from ..dispatch import INTERPRETER
from ..launch import MODELS, Constants, Launch
from .backward_kernel import hyper_connection_map_backward_kernel, hyper_connection_streams_backward_kernel
from .expand_kernel import (
    EXPAND_BACKWARD_CHANNELS,
    EXPAND_CHANNELS,
    OPTIONS,
    hyper_connection_expand_backward_kernel,
    hyper_connection_expand_kernel,
    row_blocks,
)
from .forward_kernel import hyper_connection_map_kernel, hyper_connection_project_kernel
from .reference import Connection

# None of these was measured on a GPU.
MAP_CHANNELS, MAP_PROGRAMS = 512, 512  # with few tokens, more programs share the channels of each
# The tokens of a projection program share its reads of fn; few tokens would leave most of a larger block empty.
FEW_TOKENS, MANY_TOKENS, PROJECT_CHANNELS, PROJECT_PROGRAMS = 16, 64, 64, 512
# Tokens, bytes of each token, and number of programs in the streams' backward: more programs hide more latency, but
# every group of tokens writes a part of dfn.
BACKWARD_TOKENS, BACKWARD_BYTES, BACKWARD_PROGRAMS = 16, 256, 1024
PRODUCT_OPTIONS = OPTIONS | {"num_warps": 4}
# Channels and stages of a projection program. With 64 channels, few tokens spill in the loop on sm_100: in two stages
# with Triton 3.7, in three with 3.8.
FEW_BLOCKS, MANY_BLOCKS = (32, 4), (PROJECT_CHANNELS, 3)
# Products of float32 split into parts of bfloat16: about as exact as float32, and available on every target (not in
# the interpreter).
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
        blocks = _project_blocks(tokens, num_weights)
        groups = triton.cdiv(tokens, blocks["BLOCK_T"])
        part_size = _part_size(size, PROJECT_PROGRAMS // groups, PROJECT_CHANNELS, 8)
        parts = triton.cdiv(size, part_size)
        new = partial(torch.empty, dtype=torch.float32, device=streams_BSND.device)
        sums, mix, inverse = new(parts, tokens, num_weights + 1), new(tokens, num_weights), new(tokens)
        post, comb = new(*shape, num_streams), new(*shape, num_streams, num_streams)
        collapsed = streams_BSND.new_empty(*shape, width)
        hyper_connection_project_kernel[(groups, parts)](streams_BSND, fn_MX, sums, tokens, size, part_size, **blocks)
        results, rows = (post, comb, collapsed, mix, inverse), _map_blocks(num_streams, width, iterations)
        map_size = _part_size(width, MAP_PROGRAMS // tokens, rows["BLOCK_D"])
        numbers = (tokens, width, parts, norm_eps, eps, map_size)
        hyper_connection_map_kernel[(tokens, triton.cdiv(width, map_size))](
            streams_BSND, sums, base_M, scale_3, *results, *numbers, **rows
        )
        ctx.save_for_backward(streams_BSND, fn_MX, base_M, scale_3, mix, inverse)
        ctx.eps, ctx.iterations = eps, iterations
        return post, comb, collapsed, streams_BSND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn_MX, base_M, scale_3, mix, inverse = ctx.saved_tensors
        (tokens, num_streams, width), (num_weights, size) = streams.flatten(0, -3).shape, fn_MX.shape
        grad_post, grad_comb, grad_collapsed, grad_passed = (grad.contiguous() for grad in grads)
        grad_lin, grad_sums = torch.empty_like(mix), torch.empty_like(mix)
        pre, pull = mix.new_empty(tokens, num_streams), torch.empty_like(inverse)
        saved, upstream = (base_M, scale_3, mix, inverse), (grad_post, grad_comb, grad_collapsed)
        results = (grad_lin, grad_sums, pre, pull)
        hyper_connection_map_backward_kernel[(tokens,)](
            streams, *saved, *upstream, *results, width, ctx.eps, **_map_blocks(num_streams, width, ctx.iterations)
        )
        grad_streams = torch.empty_like(streams)
        blocks = _column_blocks(num_streams, width, streams.dtype)
        columns = triton.cdiv(width, blocks["BLOCK_D"])
        group_size = _part_size(tokens, BACKWARD_PROGRAMS // columns, BACKWARD_TOKENS)
        groups = triton.cdiv(tokens, group_size)
        parts_GMX = mix.new_empty(groups, num_weights, size) if ctx.needs_input_grad[1] else None
        tensors = (streams, fn_MX, grad_sums, pre, pull, grad_collapsed, grad_passed, grad_streams, parts_GMX)
        hyper_connection_streams_backward_kernel[(columns, groups)](
            *tensors, tokens, width, group_size, **blocks, **PRODUCT_OPTIONS
        )
        grad_fn = None if parts_GMX is None else parts_GMX.sum(0).to(fn_MX.dtype)
        sizes = [num_streams, num_streams, num_streams**2]
        grad_scale_3 = torch.stack([part.sum() for part in (grad_lin * mix).sum(0).split(sizes)])
        grad_base_M = grad_lin.sum(0)
        return grad_streams, grad_fn, grad_base_M.to(base_M.dtype), grad_scale_3.to(scale_3.dtype), None, None, None


@on_its_device
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
    """Return `connect_reference`."""
    return Connection(*_Connect.apply(streams_BSND, fn_MX, base_M, scale_3, norm_eps, eps, iterations))


def _part_size(size: int, parts: int, block: int, least: int = 1) -> int:
    """Return the size of at most `parts` equal parts, a multiple of `block` and at least `least` blocks."""
    return max(triton.cdiv(triton.cdiv(size, max(parts, 1)), block), least) * block


def _project_blocks(tokens: int, num_weights: int) -> Constants:
    """Return the constants and options of the projection."""
    block_t = FEW_TOKENS if tokens <= FEW_TOKENS else MANY_TOKENS
    channels, stages = FEW_BLOCKS if tokens <= FEW_TOKENS else MANY_BLOCKS
    blocks = {"BLOCK_T": block_t, "BLOCK_M": _padded(num_weights), "BLOCK_X": channels}
    return {"M": num_weights, "PRECISION": PRECISION, **blocks, **PRODUCT_OPTIONS, "num_stages": stages}


def _map_blocks(num_streams: int, width: int, iterations: int) -> Constants:
    sizes = {"N": num_streams, "P": triton.next_power_of_2(num_streams), "STEPS": 2 * iterations}
    return sizes | row_blocks(width, MAP_CHANNELS)


def _column_blocks(num_streams: int, width: int, dtype: torch.dtype) -> Constants:
    padded = triton.next_power_of_2(num_streams)
    block_d = max(16, min(BACKWARD_BYTES // dtype.itemsize // padded, triton.next_power_of_2(width)))
    # TF32 holds bfloat16 exactly and rounds the other factor by 2^-10: less than the 2^-9 by which the bfloat16 streams
    # were rounded, as their gradient will be.
    precision = "tf32" if dtype is torch.bfloat16 and PRECISION != "ieee" else PRECISION
    blocks = {"BLOCK_T": BACKWARD_TOKENS, "BLOCK_M": _padded(num_streams * (num_streams + 2)), "BLOCK_D": block_d}
    return {"N": num_streams, "P": padded, "PRECISION": precision, **blocks}


def _padded(num_weights: int) -> int:
    return max(16, triton.next_power_of_2(num_weights))


def launches() -> list[Launch]:
    """Return the launches to compile ahead of time; the width is an argument, so one serves V4-Flash and V4-Pro."""
    shapes = MODELS["V4-Flash"]
    num_streams, width, num_weights = shapes.streams, shapes.width, shapes.streams * (shapes.streams + 2)
    types = dict.fromkeys(["T", "Q"], "i32") | dict.fromkeys(["D", "X", "part_size", "group_size"], "i32:16")
    types |= dict.fromkeys(["norm_eps", "eps"], "fp32")
    wide = ["streams", "collapsed", "passed", "output", "new"]
    types |= {f"{grad}{name}_ptr": "*bf16:16" for name in wide for grad in ("", "grad_")}

    def launch(kernel: Any, constants: Constants, label: str = "", **others: Any) -> Launch:
        settings = {**constants, **others}
        fixed = {name: value for name, value in settings.items() if name in kernel.arg_names}
        arguments = {name: types.get(name, "*fp32:16") for name in kernel.arg_names if name not in fixed}
        options = {name: settings[name] for name in OPTIONS}
        return Launch(kernel=kernel, label=label, arguments=arguments, constants=fixed, options=options)

    rows = _map_blocks(num_streams, width, iterations=20)
    columns = _column_blocks(num_streams, width, torch.bfloat16) | PRODUCT_OPTIONS
    expand, expand_backward = (
        {"N": num_streams} | row_blocks(width, channels) for channels in (EXPAND_CHANNELS, EXPAND_BACKWARD_CHANNELS)
    )
    few, many = (_project_blocks(tokens, num_weights) for tokens in (FEW_TOKENS, MANY_TOKENS))
    return [
        launch(hyper_connection_project_kernel, few, "few tokens"),
        launch(hyper_connection_project_kernel, many),
        launch(hyper_connection_map_kernel, rows),
        launch(hyper_connection_map_backward_kernel, rows),
        launch(hyper_connection_streams_backward_kernel, columns),
        launch(hyper_connection_streams_backward_kernel, columns, "frozen fn", grad_fn_ptr=None),
        launch(hyper_connection_expand_kernel, expand),
        launch(hyper_connection_expand_backward_kernel, expand_backward),
    ]
