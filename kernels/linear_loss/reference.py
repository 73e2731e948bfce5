"""The definition of `linear_loss`: full logits in fp32 and autograd, as slow and plain as the formulas.

K draft steps, T tokens, D model width, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import Divergence

HYBRID_ETA = 3.0  # lambda = exp(-3 * alpha), arXiv:2602.23881


class LinearLoss(NamedTuple):
    """Per-token outputs of `linear_loss`; zero (False) at masked entries."""

    loss_KT: Tensor  # float32 nats, differentiable with respect to the student's hidden states only
    alpha_KT: Tensor  # float32 in [0, 1], sum_v min(p, q) at temperature 1: the chance that a sampled draft is accepted
    top1_match_KT: Tensor  # bool, argmax q == argmax p (the first of equals): a greedy draft would be accepted
    entropy_T: Tensor  # float32 nats, entropy of p at temperature 1; zero if every step is masked


def linear_loss_reference(
    student_KTD: Tensor,
    teacher_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    mask_KT: Tensor | None = None,
) -> LinearLoss:
    """Return the divergence of K draft distributions from the teacher's, token by token, through one frozen lm_head.

    Row t holds, for every step, the student state that predicts the same next token as teacher row t.

    Args:
        student_KTD: draft hidden states after the final norm, floating; the only input with a gradient.
        teacher_TD: backbone hidden states after the final norm, dtype of the student.
        weight_VD: lm_head weight shared by both, dtype of the student.
        target_T: int64 token that row t predicts, in [0, V) if any step is valid there; read by `ce` alone.
        divergence: the loss.
        temperature: above 0; divides teacher and student logits alike in the loss (the loss is not rescaled by its
            square), except in `ce`. Alpha, top1_match and entropy are always taken at temperature 1.
        mask_KT: bool, False if step k has no valid row t; such rows may hold anything. None means all valid.

    Returns:
        `LinearLoss`, computed in float32 (in float64 from float64 inputs).

    """
    dtype = torch.promote_types(student_KTD.dtype, torch.float32)
    mask_KT = (
        torch.ones(student_KTD.shape[:2], dtype=torch.bool, device=student_KTD.device) if mask_KT is None else mask_KT
    )
    mask_T = mask_KT.any(0)
    weight_DV = weight_VD.detach().to(dtype).T
    # Zero rows, not zero results: 0 * NaN would leak into the gradient.
    student_KTV = student_KTD.to(dtype).masked_fill(~mask_KT[..., None], 0) @ weight_DV
    teacher_TV = teacher_TD.detach().to(dtype).masked_fill(~mask_T[:, None], 0) @ weight_DV
    target_KT = target_T.masked_fill(~mask_T, 0).expand(mask_KT.shape)

    loss_KT = token_loss_reference(student_KTV, teacher_TV, target_KT, divergence, temperature)
    log_p_TV, log_q_KTV = teacher_TV.log_softmax(-1), student_KTV.detach().log_softmax(-1)
    alpha_KT = torch.minimum(log_p_TV.exp(), log_q_KTV.exp()).sum(-1)
    top1_match_KT = student_KTV.argmax(-1) == teacher_TV.argmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    return LinearLoss(
        loss_KT.masked_fill(~mask_KT, 0),
        alpha_KT.masked_fill(~mask_KT, 0),
        top1_match_KT & mask_KT,
        entropy_T.masked_fill(~mask_T, 0),
    )


def token_loss_reference(
    student_KTV: Tensor, teacher_TV: Tensor, target_KT: Tensor, divergence: Divergence, temperature: float
) -> Tensor:
    """Return the loss of every draft distribution, [K, T], from logits; differentiable in the student's logits.

    Args:
        student_KTV: floating logits.
        teacher_TV: logits, dtype of the student.
        target_KT: int64 data tokens in [0, V); read by `ce` alone.
        divergence: the loss.
        temperature: above 0; ignored by `ce`.

    Raises:
        ValueError: the divergence is unknown.
    """
    if divergence is Divergence.ce:
        return -student_KTV.log_softmax(-1).gather(-1, target_KT[..., None]).squeeze(-1)
    log_q = (student_KTV / temperature).log_softmax(-1)
    log_p = (teacher_TV / temperature).log_softmax(-1).expand_as(log_q)
    q, p = log_q.exp(), log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    tv = (p - q).relu().sum(-1)  # 1 - sum_v min(p, q), never negative; where p = q the gradient counts p as the minimum
    match divergence:
        case Divergence.kl:
            return kl
        case Divergence.reverse_kl:
            return (q * (log_q - log_p)).sum(-1)
        case Divergence.jsd:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)
        case Divergence.tv:
            return tv
        case Divergence.neg_log_alpha:
            return -torch.where(log_q < log_p, log_q, log_p).logsumexp(-1)
        case Divergence.hybrid:
            mix = torch.exp(-HYBRID_ETA * (1 - tv.detach()))
            return mix * kl + (1 - mix) * tv
    raise ValueError(f"divergence={divergence!r} is not known; use one of {[d.value for d in Divergence]}")
