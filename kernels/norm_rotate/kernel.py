"""Triton for norm and rotation: one launch each way, and a sum over parts of the weight's gradient.

With n = x / rms(x), y = turn * (n weight) on the rotated pairs and y = n weight elsewhere, the gradients are

    d = conj(turn) * dy (d = dy elsewhere)      g = d weight
    dx = (g - n mean(g n)) / rms(x)             dweight = sum over rows of d n

The backward reads x and computes rms(x) again. There are no atomic additions.
"""

# C channels, r rotated channel pairs, Q programs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..device import on_its_device
from ..launch import MODELS, Constants, Launch
from .backward_kernel import norm_rotate_backward_kernel
from .forward_kernel import norm_rotate_forward_kernel

# None of these was measured on a GPU. A program is one warp with a few rows: no sum over channels needs a barrier.
OPTIONS = {"num_warps": 1, "num_stages": 2, "enable_fp_fusion": True}
# Values of a block of rows, which are read at once; the backward holds two of each in registers.
FORWARD_VALUES, BACKWARD_VALUES, MOST_ROWS = 2048, 1024, 8
WEIGHTED_ROWS = 16  # of a program of the weighted backward, which writes one part of the weight's gradient


class _Rows(NamedTuple):
    """The leading dimensions of a tensor as programs take them: heads, which share their turns, innermost.

    Attributes:
        order: the dimensions, outermost first; at most three.
        sizes: of three dimensions, filled up with 1 in front.
    """

    order: tuple[int, ...]
    sizes: tuple[int, int, int]

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return a tensor's strides in this order, filled up with 0 in front."""
        first, second, third = (0,) * (3 - len(self.order)) + tuple(tensor.stride(d) for d in self.order)
        return first, second, third

    def num_blocks(self, rows: int) -> int:
        """Return the number of blocks of `rows` rows."""
        return self.sizes[0] * self.sizes[1] * triton.cdiv(self.sizes[2], rows)


def _rows_of(x: Tensor, turn: Tensor) -> _Rows:
    """Return the rows of x; turn is expanded to them, real, [..., r, 2]."""
    leading = range(x.ndim - 1)
    shared = [d for d in leading if turn.stride(d) == 0 and x.shape[d] > 1]
    order = tuple(leading)
    if shared:
        order = (*(d for d in leading if d != shared[-1]), shared[-1])
    first, second, third = (1,) * (3 - len(order)) + tuple(x.shape[d] for d in order)
    return _Rows(order, (first, second, third))


def _real(turn: Tensor, x: Tensor) -> Tensor:
    """Return turns as real numbers [..., r, 2] with contiguous pairs, expanded to the rows of x."""
    real = torch.view_as_real(turn.resolve_conj().contiguous())
    return real.expand(*x.shape[:-1], *real.shape[-2:])


def _with_contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(x: Tensor, turn: Tensor, weight: Tensor | None, out: Tensor, eps: float | None) -> None:
    """Write `out`; an epsilon of None means that it is x, rotated without a norm. `turn` is real."""
    if x.numel() == 0:
        return
    rows, channels, pairs = _rows_of(x, turn), x.shape[-1], turn.shape[-2]
    blocks = _blocks(channels, pairs, rows.sizes[2], FORWARD_VALUES)
    norm_rotate_forward_kernel[(rows.num_blocks(blocks["ROWS"]),)](
        x,
        turn,
        weight,
        out,
        eps or 0.0,
        *rows.sizes[1:],
        *rows.strides(x),
        *rows.strides(turn),
        *rows.strides(out),
        IS_NORMED=eps is not None,
        **blocks,
        **OPTIONS,
    )


def _backward(
    x: Tensor, turn: Tensor, weight: Tensor | None, grad_out: Tensor, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if it is needed, of the weight; `turn` is real."""
    grad_x = torch.empty_like(x)
    rows, channels, pairs = _rows_of(x, turn), x.shape[-1], turn.shape[-2]
    blocks = _blocks(channels, pairs, rows.sizes[2], BACKWARD_VALUES)
    blocks["BLOCKS"] = triton.cdiv(WEIGHTED_ROWS, blocks["ROWS"]) if needs_weight else 1
    num_blocks = rows.num_blocks(blocks["ROWS"])
    programs = triton.cdiv(num_blocks, blocks["BLOCKS"])
    parts_QC = x.new_empty(programs, channels, dtype=torch.float32) if needs_weight else None
    if x.numel() > 0:
        norm_rotate_backward_kernel[(programs,)](
            x,
            turn,
            weight,
            grad_out,
            grad_x,
            parts_QC,
            eps,
            *rows.sizes[1:],
            num_blocks,
            *rows.strides(x),
            *rows.strides(turn),
            *rows.strides(grad_out),
            *rows.strides(grad_x),
            **blocks,
            **OPTIONS,
        )
    return grad_x, None if parts_QC is None or weight is None else parts_QC.sum(0).to(weight.dtype)


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x, turn = _with_contiguous_channels(x), _real(turn, x)
        weight = None if weight is None else weight.contiguous()
        out = torch.empty_like(x)
        _forward(x, turn, weight, out, eps)
        ctx.save_for_backward(x, turn, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, turn, weight = ctx.saved_tensors
        grad_out, needs_weight = _with_contiguous_channels(grad_out), ctx.needs_input_grad[2]
        grad_x, grad_weight = _backward(x, turn, weight, grad_out, ctx.eps, needs_weight)
        return grad_x, None, grad_weight, None


@on_its_device
def norm_and_rotate_triton(x: Tensor, turn: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """Return `norm_and_rotate_reference` in the memory layout of x; gradients are rounded once."""
    out: Tensor = _NormAndRotate.apply(x, turn, weight, eps)
    return out


@on_its_device
def rotate_in_place_triton(x: Tensor, turn: Tensor) -> Tensor:
    """Compute `rotate_in_place_reference`; no gradient."""
    _forward(x, _real(turn, x), None, x, None)
    return x


def _blocks(channels: int, pairs: int, num_rows: int, values: int) -> Constants:
    """Return the constants of a kernel whose programs take blocks of about `values` values."""
    block_e, block_p, all_rows = (
        triton.next_power_of_2(max(size, 1)) for size in (channels - 2 * pairs, pairs, num_rows)
    )
    rows = min(max(values // channels, 1), MOST_ROWS, all_rows)
    return {"C": channels, "PAIRS": pairs, "ROWS": rows, "BLOCK_E": block_e, "BLOCK_P": block_p}


def launches() -> list[Launch]:
    """Return the launches to compile ahead of time; the heads are an argument, so one serves V4-Flash and V4-Pro."""
    shapes = MODELS["V4-Flash"]
    channels, pairs = shapes.head_width, shapes.rope_width // 2
    types = dict.fromkeys(["M", "N", "num_blocks"], "i32") | {"eps": "fp32", "turn_ptr": "*fp32:16"}
    types |= {f"{name}_stride_{d}": "i32:16" for name in ("x", "turn", "out", "grad_out", "grad_x") for d in range(3)}
    types |= {f"{name}_ptr": "*bf16:16" for name in ("x", "out", "grad_out", "grad_x")}
    types |= {f"{name}_ptr": "*fp32:16" for name in ("weight", "parts")}

    def launch(kernel: Any, label: str, values: int, **settings: Any) -> Launch:
        constants = _blocks(channels, pairs, shapes.heads, values) | settings
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        return Launch(kernel=kernel, label=label, arguments=arguments, constants=constants, options=OPTIONS)

    def forward(label: str, **settings: Any) -> Launch:
        return launch(norm_rotate_forward_kernel, label, FORWARD_VALUES, **settings)

    def backward(label: str, **settings: Any) -> Launch:
        return launch(norm_rotate_backward_kernel, label, BACKWARD_VALUES, **settings)

    weighted = triton.cdiv(WEIGHTED_ROWS, _blocks(channels, pairs, shapes.heads, BACKWARD_VALUES)["ROWS"])
    return [
        forward("queries", weight_ptr=None, IS_NORMED=True),
        forward("keys", IS_NORMED=True),
        forward("in place", weight_ptr=None, IS_NORMED=False),
        backward("queries", weight_ptr=None, parts_ptr=None, BLOCKS=1),
        backward("keys", BLOCKS=weighted),
        backward("keys, frozen weight", parts_ptr=None, BLOCKS=1),
    ]
