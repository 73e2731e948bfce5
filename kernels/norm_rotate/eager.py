"""RMS norm in few passes over memory, with an analytic gradient: torch composes it of many on a CPU."""

# R rows, D channels

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST = 2**14  # values; below it the number of calls decides, and the definition makes the fewest


def rms_norm_eager(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `rms_norm_reference`; x is float32 or float64, or has a weight, and so is computed in float32."""
    if weight is None:
        out: Tensor = _RmsNorm.apply(x, None, eps)
        return out
    out = _RmsNorm.apply(x.float(), weight.float(), eps)
    return out.to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        out = x * inverse
        return out if weight_D is None else out.mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return w g i - x i^3 mean(w g x), with i = 1 / rms, and sum(g x i) of all rows."""
        x, weight_D, inverse = ctx.saved_tensors
        product_RD, weight_grad_D = (grad * x).flatten(0, -2), None
        if weight_D is None:
            dot_R = product_RD.sum(1)
            x_grad = grad * inverse
        else:
            dot_R = product_RD @ weight_D
            x_grad = (grad * weight_D).mul_(inverse)
            weight_grad_D = inverse.flatten() @ product_RD if ctx.needs_input_grad[1] else None
        factor = inverse.pow(3).mul_(dot_R.view(inverse.shape)).div_(-x.shape[-1])
        return x_grad.addcmul_(x, factor), weight_grad_D, None
