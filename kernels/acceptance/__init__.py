"""Logits of draft and target -> what a sampling policy draws, keeps of a draft and emits after it, losslessly."""

import math

import torch
from torch import Tensor

from ..dispatch import use_triton
from .draws import Stream, uniforms_reference
from .reference import (
    Verification,
    Verified,
    policy_probabilities_reference,
    sample_tokens_reference,
    verify_draft_reference,
)

__all__ = ["Stream", "Verification", "Verified", "policy_probabilities", "sample_tokens", "uniforms", "verify_draft"]


def policy_probabilities(
    logits_BKV: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """`policy_probabilities_reference`.

    Raises:
        ValueError: the logits are no floating tensor with a vocabulary, or a setting is out of its range.

    """
    if not logits_BKV.is_floating_point() or logits_BKV.ndim == 0 or logits_BKV.shape[-1] == 0:
        raise ValueError(f"logits_BKV must be floating [..., V], got {logits_BKV.dtype} {tuple(logits_BKV.shape)}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be finite and at least 0; 0 always takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep the whole vocabulary")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 keeps the whole vocabulary")
    unfit = "it takes no float64" if logits_BKV.dtype is torch.float64 else None
    if use_triton("policy_probabilities", logits_BKV, unfit):
        from .policy_kernel import policy_probabilities_triton

        return policy_probabilities_triton(logits_BKV, temperature, top_k, top_p)
    return policy_probabilities_reference(logits_BKV, temperature, top_k, top_p)


def uniforms(seed_B: Tensor, position_B: Tensor, stream: Stream, num_draws: int) -> Tensor:
    """`uniforms_reference`.

    Raises:
        ValueError: seeds and positions are not int64 [B] alike, or num_draws is negative.

    """
    if seed_B.ndim != 1 or seed_B.shape != position_B.shape:
        raise ValueError(
            f"seed_B {tuple(seed_B.shape)} and position_B {tuple(position_B.shape)} must both be [B]: one a row"
        )
    if seed_B.dtype != torch.int64 or position_B.dtype != torch.int64:
        raise ValueError(f"seed_B {seed_B.dtype} and position_B {position_B.dtype} must be torch.int64")
    if num_draws < 0:
        raise ValueError(f"num_draws={num_draws} must be at least 0")
    if use_triton("uniforms", seed_B):
        from .draws_kernel import uniforms_triton  # needs Triton, which a machine without a GPU may lack

        return uniforms_triton(seed_B, position_B, Stream(stream), num_draws)
    return uniforms_reference(seed_B, position_B, Stream(stream), num_draws)


def sample_tokens(weight_BV: Tensor, u_B: Tensor) -> Tensor:
    """`sample_tokens_reference`.

    Raises:
        ValueError: weights and draws do not fit each other.

    """
    if weight_BV.ndim != 2 or not weight_BV.is_floating_point() or weight_BV.shape[1] == 0:
        raise ValueError(f"weight_BV must be floating [B, V], got {weight_BV.dtype} {tuple(weight_BV.shape)}")
    _check_draws(u_B, (weight_BV.shape[0],))
    if use_triton("sample_tokens", weight_BV):
        from .kernel import sample_tokens_triton

        return sample_tokens_triton(weight_BV, u_B)
    return sample_tokens_reference(weight_BV, u_B)


def verify_draft(draft_BK: Tensor, q_BKV: Tensor, p_BLV: Tensor, u_BL: Tensor, verification: Verification) -> Verified:
    """`verify_draft_reference`.

    Raises:
        ValueError: shapes or dtypes disagree.

    """
    if draft_BK.ndim != 2 or draft_BK.dtype != torch.int64:
        raise ValueError(f"draft_BK must be torch.int64 [B, K], got {draft_BK.dtype} {tuple(draft_BK.shape)}")
    rows, drafted = draft_BK.shape
    if q_BKV.ndim != 3 or q_BKV.shape[:2] != (rows, drafted) or q_BKV.shape[2] == 0:
        raise ValueError(f"q_BKV is {tuple(q_BKV.shape)} but must be ({rows}, {drafted}, V): one row a drafted token")
    if p_BLV.shape != (rows, drafted + 1, q_BKV.shape[2]):
        raise ValueError(
            f"p_BLV is {tuple(p_BLV.shape)} but must be ({rows}, {drafted + 1}, {q_BKV.shape[2]}): the vocabulary of"
            " the draft, and one position more than was drafted"
        )
    if not q_BKV.is_floating_point() or q_BKV.dtype != p_BLV.dtype:
        raise ValueError(f"q_BKV {q_BKV.dtype} and p_BLV {p_BLV.dtype} must share one floating dtype")
    _check_draws(u_BL, (rows, drafted + 1))
    if use_triton("verify_draft", p_BLV):
        from .kernel import verify_draft_triton

        return verify_draft_triton(draft_BK, q_BKV, p_BLV, u_BL, Verification(verification))
    return verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, Verification(verification))


def _check_draws(u: Tensor, shape: tuple[int, ...]) -> None:
    if u.shape != shape or u.dtype != torch.float64:
        raise ValueError(f"draws are {u.dtype} {tuple(u.shape)} but must be torch.float64 {shape}, as uniforms gives")
