"""Definition of RMS norm and partial interleaved RoPE, as they surround DeepSeek-V4's attention.

Source: `DeepseekV4RMSNorm`, `DeepseekV4UnweightedRMSNorm` and `apply_rotary_pos_emb` of transformers.
"""

# C channels, r channel pairs that are rotated: the last 2r channels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the normed x, computed in float32 and rounded once to its dtype.

    Args:
        x: floating [..., C].
        weight: [C] of any floating dtype, or None.
        eps: added to the mean square.
    """
    if weight is None:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    weight = weight.float()
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def rotate_reference(x: Tensor, turn: Tensor) -> Tensor:
    """Return x with its last 2r channels rotated pair by pair, in float32.

    Args:
        x: floating [..., C].
        turn: complex64 [..., r], broadcast over x; its conjugate rotates back.
    """
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat([x[..., :-width], rotated.to(x.dtype)], dim=-1)


def rotate_in_place_reference(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate x itself, which needs no copy of it, and return x; otherwise `rotate_reference`."""
    rotated = x[..., -2 * turn.shape[-1] :]
    pairs = torch.view_as_complex(rotated.float().unflatten(-1, (-1, 2)))  # a view if x is float32
    pairs *= turn
    if x.dtype is not torch.float32:
        rotated.copy_(torch.view_as_real(pairs).flatten(-2))
    return x


def norm_and_rotate_reference(x: Tensor, turn: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """Return x normed over its channels, with its last 2r channels then rotated.

    Args:
        x: floating [..., C].
        turn: complex64 [..., r], broadcast over x.
        weight: [C], or None for the norm of V4's query heads.
        eps: added to the mean square.

    Returns:
        Shape and dtype of x; rounded after the norm, and the rotated channels once more.
    """
    return rotate_reference(rms_norm_reference(x, weight, eps), turn)
