"""What a verify pass emits: how much of the draft is kept, and the verifier's own token after it."""

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtptrain.decoding.policy import Policy
from mtptrain.kernels.acceptance import verify_draft


@dataclass(frozen=True, slots=True)
class Draft:
    """What was drafted.

    Attributes:
        tokens_BK: int64; K may be smaller than was asked for, where every row stopped before.
        q_BKV: float32 distributions they were drawn from; None says that each was certain (a greedy draft).
        drafted_B: int64 in [0, K], tokens that count in each row; what follows them holds anything.
    """

    tokens_BK: Tensor
    q_BKV: Tensor | None
    drafted_B: Tensor

    @classmethod
    def nothing(cls, drafted_B: Tensor) -> Draft:
        """No tokens in any row; drafted_B is 0 throughout."""
        return cls(drafted_B.new_empty(len(drafted_B), 0), None, drafted_B)

    @property
    def counts_BK(self) -> Tensor:
        """Bool, which tokens count."""
        place_K = torch.arange(self.tokens_BK.shape[1], device=self.tokens_BK.device)
        return place_K < self.drafted_B.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Emission:
    """What a pass emits in each row: the first `accepted_B + 1` of `tokens_BL`.

    Attributes:
        accepted_B: int64 in [0, K], kept drafts.
        tokens_BL: int64, the kept drafts and the verifier's own token after them; then anything.
        gap_BL: float32, difference of the verifier's two largest logits at each.
        probability_BL: float32, what the policy gave each.
    """

    accepted_B: Tensor
    tokens_BL: Tensor
    gap_BL: Tensor
    probability_BL: Tensor


def top_two_gap(logits_BLV: Tensor) -> Tensor:
    """Difference of the two largest logits, float32 [B, L]."""
    largest_BL2 = logits_BLV.topk(2, dim=-1).values.float()
    return largest_BL2[..., 0] - largest_BL2[..., 1]


def verify(policy: Policy, draft: Draft, logits_BLV: Tensor, u_BL: Tensor | None) -> Emission:
    """Keep what the policy's verification keeps, and take its next token.

    Args:
        policy: of the run.
        draft: with K = L - 1 tokens a row.
        logits_BLV: the backbone's, at the last known token and at each drafted one.
        u_BL: float64 draws, see `Draws.verify`; not read by a greedy policy.
    """
    if policy.is_greedy or u_BL is None:
        return _verify_greedy(draft, logits_BLV)
    p_BLV = policy.target(logits_BLV)
    q_BKV = draft.q_BKV
    if q_BKV is None:
        q_BKV = torch.zeros_like(p_BLV[:, :-1]).scatter_(-1, draft.tokens_BK.unsqueeze(-1), 1.0)
    q_BKV = q_BKV * draft.counts_BK.unsqueeze(-1)
    accepted_B, token_B = verify_draft(draft.tokens_BK, q_BKV, p_BLV, u_BL, policy.verification)
    tokens_BL = torch.cat([draft.tokens_BK, token_B.unsqueeze(1)], dim=1)
    tokens_BL.scatter_(1, accepted_B.unsqueeze(1), token_B.unsqueeze(1))
    probability_BL = p_BLV.gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    return Emission(accepted_B, tokens_BL, top_two_gap(logits_BLV), probability_BL)


def _verify_greedy(draft: Draft, logits_BLV: Tensor) -> Emission:
    """`verify` where every distribution is one-hot: a draft is kept while it is the backbone's own first choice."""
    tokens_BL = logits_BLV.argmax(-1)
    kept_BK = (draft.tokens_BK == tokens_BL[:, :-1]) & draft.counts_BK
    accepted_B = kept_BK.long().cumprod(1).sum(1)
    gap_BL = top_two_gap(logits_BLV)
    return Emission(accepted_B, tokens_BL, gap_BL, torch.ones_like(gap_BL))
