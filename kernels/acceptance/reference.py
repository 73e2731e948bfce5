"""The definition of sampling policies and of lossless verification, as plain as the papers.

A draft x_1..x_K was drawn from q. Both verifications make an independent draw for every x_k, which succeeds with
probability h_k, keep a prefix of length a, and then emit one more token from norm(max(w_a p - q, 0)), with p and q the
distributions after the kept tokens. They differ in

              keeps tokens             w_k                               h_k
    token     to the first failure     1                                 min(1, p(x_k) / q(x_k))
    block     to the last success      min(1, w_{k-1} p(x_k) / q(x_k))   R_k / (R_k + 1 - w_k)

with w_0 = 1 and R_k = sum_v max(w_k p_v - q_v, 0) of the distributions after x_k. The first failure is not kept, the
last success is. Nothing is drafted after x_K; with q = 0 there, the same formulas give the token after a whole draft,
drawn from p, and h_K = w_K for block.

In block verification the chance of keeping x_1..x_k or more is w_k: R_k for stopping there, and
sum_v q_v min(1, w_k p_v / q_v) = w_k - R_k for continuing. In token-wise verification it is the product of
min(1, p(x_j) / q(x_j)), which is never larger.

All computations are in float64, and all summands lie on a grid (`on_grid`). Sums are therefore exact, and a token
depends neither on the order in which a device adds nor on the shape of a launch.

B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import Verification


class Sampling(NamedTuple):
    """Settings of a sampling policy."""

    temperature: float  # at least 0; 0 puts all mass on the largest logit, the lowest id of equals
    top_k: int | None = None  # at least 1, keeps that many tokens; None keeps all
    top_p: float = 1.0  # in (0, 1], keeps the fewest likeliest tokens whose mass reaches it


class Emission(NamedTuple):
    """Tokens that a pass emits in each row: the first `accepted_B + 1` of `tokens_BL`."""

    accepted_B: Tensor  # int64 in [0, K], number of kept drafted tokens
    tokens_BL: Tensor  # int64, the kept drafted tokens and the target's token after them; the rest is arbitrary
    gap_BL: Tensor  # float32, difference of the target's two largest logits
    probability_BL: Tensor  # float32, probability of each token under the policy


class Verified(NamedTuple):
    """Result of one verification: the first `accepted_B` drafted tokens are emitted, then `token_B`."""

    accepted_B: Tensor  # int64 in [0, K]
    token_B: Tensor  # int64 in [0, V)


GRID = 2.0**-52  # float64 is exact on its multiples up to 2


def on_grid(x: Tensor) -> Tensor:
    """Return x in float64, rounded down to multiples of 2^-52; sums of a distribution are then exact in any order."""
    return (x.double() / GRID).floor() * GRID


def policy_probabilities_reference(logits_BKV: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution from which a sampling policy draws.

    Temperature applies first, then top-k, then top-p to the result of top-k; of equal logits the lower ids are kept.

    Args:
        logits_BKV: floating, no NaN, at least one finite logit in each row; any leading dimensions.
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
    """Return one token for each row, drawn in proportion to the weights.

    It is the first token whose cumulative weight exceeds u times the total.

    Args:
        weight_BV: floating, at least 0; rounded down to multiples of 2^-52; not all 0 in a row.
        u_B: float64 uniform draws in [0, 1), the only randomness.

    Returns:
        int64 [B]; never a token of weight 0.
    """
    cumulated_BV = on_grid(weight_BV).cumsum(-1)
    threshold_B1 = u_B.unsqueeze(-1) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True).squeeze(-1)


def residual(q_BLV: Tensor, p_BLV: Tensor, weight_BL: Tensor) -> Tensor:
    """Return max(w p - q, 0), the unnormalised distribution of the token after a kept prefix, on the grid."""
    return on_grid((weight_BL.unsqueeze(-1) * p_BLV - q_BLV).clamp(min=0))


def keep_probabilities(
    draft_BK: Tensor, q_BLV: Tensor, p_BLV: Tensor, verification: Verification
) -> tuple[Tensor, Tensor]:
    """Return h and w of the module docstring's table.

    Args:
        draft_BK: int64 drafted tokens.
        q_BLV: float64 draft probabilities; all 0 at positions without a drafted token, of which the last is one.
        p_BLV: float64 target probabilities.
        verification: token-wise or by block.

    Returns:
        h [B, K] and w [B, L], float64. A token with q = 0 is never kept.
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
    # 0 / 0 means p = q at w = 1, where a verification cannot end; h = 0 keeps that true despite rounding.
    keep_BL = torch.where(mass_BL > 0, mass_BL / (mass_BL + 1 - weight_BL), 0)
    return keep_BL[:, 1:], weight_BL


def accepted_length(kept_BK: Tensor, verification: Verification) -> Tensor:
    """Return the length of the kept prefix, int64 [B] in [0, K]: to the first failure (token) or last success (block).

    Args:
        kept_BK: bool, whether the draw of each drafted token succeeded.
        verification: token-wise or by block.
    """
    if verification is Verification.token:
        return kept_BK.long().cumprod(-1).sum(-1)
    return (kept_BK.flip(-1).cumsum(-1) > 0).sum(-1)


def next_token_weights(q_BLV: Tensor, p_BLV: Tensor, weight_BL: Tensor, accepted_B: Tensor) -> Tensor:
    """Return the unnormalised distribution [B, V] of the token after the kept prefix."""
    row_B = torch.arange(len(accepted_B), device=accepted_B.device)
    q_B1V, p_B1V, weight_B1 = (x[row_B, accepted_B].unsqueeze(1) for x in (q_BLV, p_BLV, weight_BL))
    left_BV = residual(q_B1V, p_B1V, weight_B1).squeeze(1)
    # A residual of 0 has probability 0 but for rounding, and then p and q are equal.
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_B1V.squeeze(1))


def verify_draft_reference(
    draft_BK: Tensor, q_BKV: Tensor, p_BLV: Tensor, u_BL: Tensor, verification: Verification
) -> Verified:
    """Return the length of each draft's kept prefix and the token after it; the text is distributed as the target's.

    Args:
        draft_BK: int64 drafted tokens, each in [0, V) and drawn from its row of q; K may be 0.
        q_BKV: floating draft probabilities; rows sum to 1. The rows of a greedy draft are one-hot; a draft shorter than
            K has zeros at every position that it does not use.
        p_BLV: target probabilities, dtype of q; row k is the distribution of drafted token k + 1, the last row that of
            the token after a whole draft.
        u_BL: float64 uniform draws in [0, 1), the only randomness; the last one chooses the token.
        verification: token-wise or by block.

    Source: arXiv:2211.17192, Algorithm 1; arXiv:2403.10444, Algorithm 2.
    """
    p_BLV, q_BLV = p_BLV.double(), torch.nn.functional.pad(q_BKV.double(), (0, 0, 0, 1))
    keep_BK, weight_BL = keep_probabilities(draft_BK, q_BLV, p_BLV, verification)
    accepted_B = accepted_length(u_BL[:, :-1] < keep_BK, verification)
    next_BV = next_token_weights(q_BLV, p_BLV, weight_BL, accepted_B)
    return Verified(accepted_B, sample_tokens_reference(next_BV, u_BL[:, -1]))


def top_tokens_reference(logits_BLV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens, int64 [B, L], and the gaps from their logits to the next ones, float32 [B, L].

    Of equal logits the lowest id wins. In a vocabulary of one token the gap is infinite.
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
    """Return `verify_draft_reference` of the policy's distributions, and the numbers that a decoding loop records.

    Args:
        draft_BK: int64 drafted tokens, each in [0, V); K may be 0.
        drafted_B: int64 in [0, K], the number of drafted tokens that count in each row.
        draft_logits_BKV: floating logits from which the policy drew the draft; None if every drafted token was certain.
        logits_BLV: floating logits of the target at the last known token and at each drafted one, dtype of the draft's.
        u_BL: float64 uniform draws in [0, 1), the only randomness; not read at temperature 0.
        sampling: the policy.
        verification: token-wise or by block; at temperature 0 both keep the tokens that the target would have chosen.
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
    """Keep each draft as long as it equals the target's first choices, and return the emission.

    Args:
        draft_BK: int64 drafted tokens.
        drafted_B: int64 in [0, K], the number of drafted tokens that count in each row.
        top_BL: int64, the target's first choices.
        gap_BL: float32, the gaps from their logits to the next ones.
    """
    kept_BK = (draft_BK == top_BL[:, :-1]) & _counts(draft_BK, drafted_B)
    return Emission(kept_BK.long().cumprod(1).sum(1), top_BL, gap_BL, torch.ones_like(gap_BL))


def _counts(draft_BK: Tensor, drafted_B: Tensor) -> Tensor:
    """Return which drafted tokens count, bool [B, K]."""
    return torch.arange(draft_BK.shape[1], device=draft_BK.device) < drafted_B.unsqueeze(1)
