"""From logits of draft and target to the tokens that a sampling policy draws, keeps and emits, losslessly."""

import math

import torch
from torch import Tensor

from ..choices import Verification
from ..dispatch import use_triton
from .draws import DrawKind, uniforms_reference
from .reference import (
    Emission,
    Sampling,
    emit_greedily,
    policy_probabilities_reference,
    verify_logits_reference,
)

__all__ = [
    "DrawKind",
    "Emission",
    "Sampling",
    "Verification",
    "policy_probabilities",
    "sample_logits",
    "uniforms",
    "verify_logits",
]


def policy_probabilities(logits_BKV: Tensor, sampling: Sampling) -> Tensor:
    """Return `policy_probabilities_reference`.

    Raises:
        ValueError: the logits are not a floating tensor with a vocabulary, or a setting is out of range.

    """
    _check_logits("logits_BKV", logits_BKV)
    _check_sampling(sampling)
    if sampling.temperature > 0 and use_triton("policy_probabilities", logits_BKV, _unfit(logits_BKV)):
        from .kernel import policy_probabilities_triton  # needs Triton, which a machine without a GPU may lack

        return policy_probabilities_triton(logits_BKV, sampling)
    return policy_probabilities_reference(logits_BKV, sampling)


def uniforms(seed_B: Tensor, position_B: Tensor, kind: DrawKind, num_draws: int) -> Tensor:
    """Return `uniforms_reference`.

    Raises:
        ValueError: seeds and positions are not both int64 [B], or num_draws is negative.

    """
    if seed_B.ndim != 1 or seed_B.shape != position_B.shape:
        raise ValueError(
            f"seed_B {tuple(seed_B.shape)} and position_B {tuple(position_B.shape)} must both be [B]: one for each row"
        )
    if seed_B.dtype != torch.int64 or position_B.dtype != torch.int64:
        raise ValueError(f"seed_B {seed_B.dtype} and position_B {position_B.dtype} must be torch.int64")
    if num_draws < 0:
        raise ValueError(f"num_draws={num_draws} must be at least 0")
    if use_triton("uniforms", seed_B):
        from .draws_kernel import uniforms_triton

        return uniforms_triton(seed_B, position_B, DrawKind(kind), num_draws)
    return uniforms_reference(seed_B, position_B, DrawKind(kind), num_draws)


def sample_logits(logits_BV: Tensor, sampling: Sampling, u_B: Tensor) -> Tensor:
    """Return one token for each row, drawn under the policy, as `verify_logits` does without a draft.

    Args:
        logits_BV: floating.
        sampling: the policy.
        u_B: float64 uniform draws in [0, 1), the only randomness.

    Returns:
        int64 [B].

    Raises:
        ValueError: the shapes or dtypes of logits and draws disagree, or a setting is out of range.

    """
    draft_B0 = torch.empty(len(logits_BV), 0, dtype=torch.int64, device=logits_BV.device)
    emission = verify_logits(draft_B0, draft_B0.sum(1), None, logits_BV[:, None], u_B[:, None], sampling)
    return emission.tokens_BL[:, 0]


def verify_logits(
    draft_BK: Tensor,
    drafted_B: Tensor,
    draft_logits_BKV: Tensor | None,
    logits_BLV: Tensor,
    u_BL: Tensor | None,
    sampling: Sampling,
    verification: Verification = Verification.token,
) -> Emission:
    """Return `verify_logits_reference`.

    Raises:
        ValueError: shapes or dtypes disagree, or a setting is out of range.

    """
    _check_sampling(sampling)
    _check_drafts(draft_BK, drafted_B, draft_logits_BKV, logits_BLV)
    if u_BL is not None and (u_BL.shape != logits_BLV.shape[:2] or u_BL.dtype != torch.float64):
        raise ValueError(
            f"draws are {u_BL.dtype} {tuple(u_BL.shape)} but must be torch.float64 {tuple(logits_BLV.shape[:2])}: use"
            " uniforms"
        )
    if u_BL is None and sampling.temperature > 0:
        raise ValueError(f"temperature={sampling.temperature} needs draws; only 0 works without them")
    verification = Verification(verification)
    if not use_triton("verify_logits", logits_BLV, _unfit(logits_BLV)):
        return verify_logits_reference(draft_BK, drafted_B, draft_logits_BKV, logits_BLV, u_BL, sampling, verification)
    from .kernel import top_tokens_triton, verify_logits_triton

    if sampling.temperature == 0 or u_BL is None:
        return emit_greedily(draft_BK, drafted_B, *top_tokens_triton(logits_BLV))
    return verify_logits_triton(draft_BK, drafted_B, draft_logits_BKV, logits_BLV, u_BL, sampling, verification)


def _unfit(logits: Tensor) -> str | None:
    return "it takes no float64" if logits.dtype is torch.float64 else None


def _check_logits(name: str, logits: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be floating [..., V], got {logits.dtype} {tuple(logits.shape)}")


def _check_sampling(sampling: Sampling) -> None:
    temperature, top_k, top_p = sampling
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature} must be finite and at least 0; 0 always chooses the likeliest token"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep the whole vocabulary")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 keeps the whole vocabulary")


def _check_drafts(draft_BK: Tensor, drafted_B: Tensor, draft_logits_BKV: Tensor | None, logits_BLV: Tensor) -> None:
    if draft_BK.ndim != 2 or draft_BK.dtype != torch.int64:
        raise ValueError(f"draft_BK must be torch.int64 [B, K], got {draft_BK.dtype} {tuple(draft_BK.shape)}")
    rows, drafted = draft_BK.shape
    if drafted_B.shape != (rows,) or drafted_B.dtype != torch.int64:
        raise ValueError(f"drafted_B must be torch.int64 ({rows},), got {drafted_B.dtype} {tuple(drafted_B.shape)}")
    _check_logits("logits_BLV", logits_BLV)
    if logits_BLV.ndim != 3 or logits_BLV.shape[:2] != (rows, drafted + 1):
        raise ValueError(
            f"logits_BLV is {tuple(logits_BLV.shape)} but must be ({rows}, {drafted + 1}, V): one position more than"
            " drafted tokens"
        )
    needed = (rows, drafted, logits_BLV.shape[2])
    if draft_logits_BKV is None:
        return
    if draft_logits_BKV.shape != needed or draft_logits_BKV.dtype != logits_BLV.dtype:
        raise ValueError(
            f"draft_logits_BKV is {draft_logits_BKV.dtype} {tuple(draft_logits_BKV.shape)} but must be"
            f" {logits_BLV.dtype} {needed}: dtype of the target's, one row for each drafted token"
        )
