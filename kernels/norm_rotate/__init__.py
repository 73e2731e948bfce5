"""RMS norm and partial RoPE before an attention, in one launch."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from .eager import FEWEST, rms_norm_eager
from .reference import rms_norm_reference, rotate_in_place_reference, rotate_reference

__all__ = ["norm_and_rotate", "rms_norm", "rotate_", "runs_triton"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `rms_norm_reference`."""
    is_float32 = x.dtype is torch.float32 or (weight is not None and x.dtype is not torch.float64)
    if x.is_cpu and is_float32 and x.numel() >= FEWEST:
        return rms_norm_eager(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def norm_and_rotate(x: Tensor, turn: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """Return `norm_and_rotate_reference`; no gradient reaches `turn`.

    Raises:
        ValueError: shapes disagree.
    """
    _check(x, turn)
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} but must be ({x.shape[-1]},): a factor for each channel")
    if runs_triton(x):
        from .kernel import norm_and_rotate_triton  # needs Triton, which a machine without a GPU may lack

        return norm_and_rotate_triton(x, turn, weight, eps=eps)
    return rotate_reference(rms_norm(x, weight, eps), turn)


def rotate_(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate x in place, and return x; Triton reads and writes the rotated channels only, and gives no gradient.

    Raises:
        ValueError: shapes disagree.
    """
    _check(x, turn)
    if use_triton("norm_rotate", x, _unfit(x) or _unfit_in_place(x)):
        from .kernel import rotate_in_place_triton  # needs Triton, which a machine without a GPU may lack

        return rotate_in_place_triton(x, turn)
    return rotate_in_place_reference(x, turn)


def runs_triton(x: Tensor) -> bool:
    """Return whether Triton norms and rotates this tensor."""
    return use_triton("norm_rotate", x, _unfit(x))


def _check(x: Tensor, turn: Tensor) -> None:
    channels, width = x.shape[-1], 2 * turn.shape[-1]
    if not 0 < width <= channels:
        raise ValueError(f"turn rotates {width} channels, and x has {channels}")
    leading = (1,) * (x.ndim - turn.ndim) + turn.shape[:-1]
    fits = len(leading) == x.ndim - 1
    if not fits or any(have not in (1, need) for have, need in zip(leading, x.shape[:-1], strict=True)):
        raise ValueError(f"turn is {tuple(turn.shape)}, which does not broadcast over x, {tuple(x.shape)}")


def _unfit(x: Tensor) -> str | None:
    if x.dtype is torch.float64:
        return "its input is float64"
    return f"its input has {x.ndim} dimensions, more than 4" if x.ndim > 4 else None


def _unfit_in_place(x: Tensor) -> str | None:
    if torch.is_grad_enabled() and x.requires_grad:
        return "its input needs a gradient and is rotated in place"
    return None if x.stride(-1) == 1 else "its input is rotated in place and its channels are not contiguous"
