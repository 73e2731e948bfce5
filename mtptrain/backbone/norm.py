"""RMS norm in few passes over memory, with an analytic gradient: torch composes it of many on a CPU."""

# R rows, D channels

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST = 2**14  # values; below it the number of calls decides, and torch's is the smallest


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Return `torch.nn.functional.rms_norm` over the last dimension.

    Args:
        x: floating [..., D].
        weight_D: factor of each channel, in the dtype of x; None multiplies by nothing.
        eps: added to the mean square.
    """
    if not x.is_cpu or x.numel() < FEWEST or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight_D, eps)
    out: Tensor = _RmsNorm.apply(x, weight_D, eps)
    return out


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
