"""The definition of sampling policies and of lossless verification, as plain as the papers.

A draft x_1..x_K was drawn from q. Either way of verifying it keeps a prefix by independent draws, x_k with probability
h_k, and then emits one more token from norm(max(w_a p - q, 0)), where a tokens were kept and p, q are the
distributions after them. The two ways differ in

              keeps                    w_k                               h_k
    token     up to the first miss     1                                 min(1, p(x_k) / q(x_k))
    block     up to the last hit       min(1, w_{k-1} p(x_k) / q(x_k))   R_k / (R_k + 1 - w_k)

with w_0 = 1 and R_k = sum_v max(w_k p_v - q_v, 0), of the distributions after x_k. Nothing is drafted after x_K; with
q = 0 there, the same formulas give the token after a whole draft, drawn from p, and block's h_K = w_K.

In block verification the chance of keeping x_1..x_k or more is w_k: R_k from ending there, and from going on
sum_v q_v min(1, w_k p_v / q_v) = w_k - R_k. In token-wise verification it is the product of min(1, p(x_j) / q(x_j)),
which is never more.

All of it is float64, and what is summed lies on a grid (`on_grid`): sums are then exact, so that a token depends on
neither the order in which a device adds nor the shape of a launch.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import Verification


class Sampling(NamedTuple):
    """What a sampling policy makes of logits."""

    temperature: float  # at least 0; 0 puts everything on the largest logit, the lowest id of equals
    top_k: int | None = None  # at least 1, keeps that many tokens; None keeps all
    top_p: float = 1.0  # in (0, 1], keeps the fewest likeliest tokens whose mass reaches it


class Emission(NamedTuple):
    """What a pass emits in each row: the first `accepted_B + 1` of `tokens_BL`."""

    accepted_B: Tensor  # int64 in [0, K], kept drafts
    tokens_BL: Tensor  # int64, the kept drafts and the target's own token after them; then anything
    gap_BL: Tensor  # float32, difference of the target's two largest logits
    probability_BL: Tensor  # float32, what the policy gave each


class Verified(NamedTuple):
    """What one verification emits: the first `accepted_B` drafted tokens, then `token_B`."""

    accepted_B: Tensor  # int64 in [0, K]
    token_B: Tensor  # int64 in [0, V)


GRID = 2.0**-52  # float64 is exact on its multiples up to 2


def on_grid(x: Tensor) -> Tensor:
    """Float64, rounded down to multiples of 2^-52: the sum of a distribution is exact whatever is added first."""
    return (x.double() / GRID).floor() * GRID


def policy_probabilities_reference(logits_BKV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a sampling policy draws from.

    Temperature first, then top-k, then top-p of what top-k left; of equal logits the lower ids are kept.

    Args:
        logits_BKV: floating, without NaN, at least one finite in each row; any leading dimensions.
        sampling: the policy.

    Returns:
        float32 (float64 from float64 logits), the shape of the logits; rows sum to 1.
    """
    temperature, top_k, top_p = sampling
    logits_BKV = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))
    if temperature == 0:
        best_BK1 = logits_BKV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BKV).scatter_(-1, best_BK1, 1)
    # Shifted before the division, which would overflow at a low temperature.
    p_BKV = ((logits_BKV - logits_BKV.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None and top_p == 1:
        return p_BKV
    sorted_BKV, order_BKV = p_BKV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BKV[..., top_k:] = 0
        sorted_BKV /= sorted_BKV.sum(-1, keepdim=True)
    if top_p < 1:
        reached_BKV = on_grid(sorted_BKV).cumsum(-1) >= top_p
        sorted_BKV[..., 1:].masked_fill_(reached_BKV[..., :-1], 0)
        sorted_BKV /= sorted_BKV.sum(-1, keepdim=True)
    return torch.zeros_like(p_BKV).scatter_(-1, order_BKV, sorted_BKV)


def sample_tokens_reference(weight_BV: Tensor, u_B: Tensor) -> Tensor:
    """One token a row, drawn in proportion to the weights: the first whose cumulated weight exceeds u of the total.

    Args:
        weight_BV: floating, at least 0, in units of 2^-52 below which nothing counts; not all 0 in a row.
        u_B: float64 uniform draws in [0, 1), the only randomness.

    Returns:
        int64 [B]; never a token of weight 0.
    """
    cumulated_BV = on_grid(weight_BV).cumsum(-1)
    threshold_B1 = u_B.unsqueeze(-1) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True).squeeze(-1)


def residual(q_BLV: Tensor, p_BLV: Tensor, weight_BL: Tensor) -> Tensor:
    """max(w p - q, 0): in proportion to it the token after a kept prefix is drawn; not normalised, on the grid."""
    return on_grid((weight_BL.unsqueeze(-1) * p_BLV - q_BLV).clamp(min=0))


def keep_probabilities(
    draft_BK: Tensor, q_BLV: Tensor, p_BLV: Tensor, verification: Verification
) -> tuple[Tensor, Tensor]:
    """The table of the module docstring.

    Args:
        draft_BK: int64 drafted tokens.
        q_BLV: float64 draft probabilities, 0 throughout a position where nothing was drafted, the last at least.
        p_BLV: float64 target probabilities.
        verification: which of the two ways.

    Returns:
        h [B, K] and w [B, L]. A token with q = 0 is never kept.
    """
    token_BK1 = draft_BK.unsqueeze(-1)
    q_BK, p_BK = (x[:, :-1].gather(-1, token_BK1).squeeze(-1) for x in (q_BLV, p_BLV))
    ratio_BK = torch.where(q_BK > 0, p_BK / q_BK, 0)
    weight_BL = torch.ones_like(p_BLV[..., 0])
    if verification is Verification.token:
        return ratio_BK.clamp(max=1), weight_BL
    for k in range(draft_BK.shape[1]):
        weight_BL[:, k + 1] = (weight_BL[:, k] * ratio_BK[:, k]).clamp(max=1)
    mass_BL = residual(q_BLV, p_BLV, weight_BL).sum(-1)
    # 0 / 0, p = q at w = 1, cannot be where verification ends; 0 also says so to rounding.
    keep_BL = torch.where(mass_BL > 0, mass_BL / (mass_BL + 1 - weight_BL), 0)
    return keep_BL[:, 1:], weight_BL


def accepted_length(kept_BK: Tensor, verification: Verification) -> Tensor:
    """Length of the kept prefix, int64 [B] in [0, K]: up to the first miss (token) or the last hit (block)."""
    if verification is Verification.token:
        return kept_BK.long().cumprod(-1).sum(-1)
    return (kept_BK.flip(-1).cumsum(-1) > 0).sum(-1)


def next_token_weights(q_BLV: Tensor, p_BLV: Tensor, weight_BL: Tensor, accepted_B: Tensor) -> Tensor:
    """Unnormalised distribution [B, V] of the token after the kept prefix."""
    row_B = torch.arange(len(accepted_B), device=accepted_B.device)
    q_B1V, p_B1V, weight_B1 = (x[row_B, accepted_B].unsqueeze(1) for x in (q_BLV, p_BLV, weight_BL))
    left_BV = residual(q_B1V, p_B1V, weight_B1).squeeze(1)
    # A residual of 0 has probability 0 but for rounding, and then p and q are equal.
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_B1V.squeeze(1))


def verify_draft_reference(
    draft_BK: Tensor, q_BKV: Tensor, p_BLV: Tensor, u_BL: Tensor, verification: Verification
) -> Verified:
    """How much of each draft is kept, and the token after it: together distributed as the target's own text.

    Args:
        draft_BK: int64 drafted tokens, each in [0, V) and drawn from its row of q; K may be 0.
        q_BKV: floating draft probabilities; rows sum to 1. A greedy draft has a one-hot row, a row drafted shorter
            than K has zeros in every position it does not use.
        p_BLV: target probabilities, dtype of q; row k is the distribution of drafted token k + 1, the last that of the
            token after a whole draft.
        u_BL: float64 uniform draws in [0, 1), the only randomness; the last chooses the token.
        verification: which of the two ways.

    Source: arXiv:2211.17192, Algorithm 1; arXiv:2403.10444, Algorithm 2.
    """
    p_BLV, q_BLV = p_BLV.double(), torch.nn.functional.pad(q_BKV.double(), (0, 0, 0, 1))
    keep_BK, weight_BL = keep_probabilities(draft_BK, q_BLV, p_BLV, verification)
    accepted_B = accepted_length(u_BL[:, :-1] < keep_BK, verification)
    next_BV = next_token_weights(q_BLV, p_BLV, weight_BL, accepted_B)
    return Verified(accepted_B, sample_tokens_reference(next_BV, u_BL[:, -1]))


def top_tokens_reference(logits_BLV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, int64 [B, L], and how far their logits are above the next ones, float32 [B, L].

    Of equals the lowest id is taken; a vocabulary of one token is infinitely far above nothing.
    """
    top_BL = logits_BLV.argmax(-1)
    if logits_BLV.shape[-1] == 1:
        return top_BL, torch.full_like(top_BL, torch.inf, dtype=torch.float32)
    largest_BL2 = logits_BLV.topk(2, dim=-1).values.float()
    return top_BL, largest_BL2[..., 0] - largest_BL2[..., 1]


def verify_logits_reference(
    draft_BK: Tensor,
    drafted_B: Tensor,
    draft_logits_BKV: Tensor | None,
    logits_BLV: Tensor,
    u_BL: Tensor | None,
    sampling: Sampling,
    verification: Verification,
) -> Emission:
    """`verify_draft_reference` of the policy's distributions, with what a decoding loop keeps of them.

    Args:
        draft_BK: int64 drafted tokens, each in [0, V); K may be 0.
        drafted_B: int64 in [0, K], how many of them count.
        draft_logits_BKV: what they were drawn from under the policy; None where each was certain.
        logits_BLV: the target's, at the last known token and at each drafted one.
        u_BL: float64 uniform draws in [0, 1), the only randomness; not read at temperature 0.
        sampling: the policy.
        verification: how a draft is verified; at temperature 0 both ways keep what the target would have chosen.
    """
    top_BL, gap_BL = top_tokens_reference(logits_BLV)
    if sampling.temperature == 0 or u_BL is None:
        return emit_greedily(draft_BK, drafted_B, top_BL, gap_BL)
    p_BLV = policy_probabilities_reference(logits_BLV, sampling)
    if draft_logits_BKV is None:
        q_BKV = torch.zeros_like(p_BLV[:, :-1]).scatter_(-1, draft_BK.unsqueeze(-1), 1.0)
    else:
        q_BKV = policy_probabilities_reference(draft_logits_BKV, sampling)
    q_BKV = q_BKV * _counts(draft_BK, drafted_B).unsqueeze(-1)
    verified = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
    tokens_BL = torch.cat([draft_BK, verified.token_B.unsqueeze(1)], dim=1)
    tokens_BL.scatter_(1, verified.accepted_B.unsqueeze(1), verified.token_B.unsqueeze(1))
    probability_BL = p_BLV.gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    return Emission(verified.accepted_B, tokens_BL, gap_BL, probability_BL.float())


def emit_greedily(draft_BK: Tensor, drafted_B: Tensor, top_BL: Tensor, gap_BL: Tensor) -> Emission:
    """A draft is kept while it is the target's own first choice.

    Args:
        draft_BK: int64 drafted tokens.
        drafted_B: int64, how many of them count.
        top_BL: int64, the target's first choices.
        gap_BL: float32, how far they are above the next ones.
    """
    kept_BK = (draft_BK == top_BL[:, :-1]) & _counts(draft_BK, drafted_B)
    return Emission(kept_BK.long().cumprod(1).sum(1), top_BL, gap_BL, torch.ones_like(gap_BL))


def _counts(draft_BK: Tensor, drafted_B: Tensor) -> Tensor:
    """Bool [B, K], which drafted tokens count."""
    return torch.arange(draft_BK.shape[1], device=draft_BK.device) < drafted_B.unsqueeze(1)
