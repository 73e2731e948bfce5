"""What a verify pass emits: how much of the draft is kept, and the verifier's own token after it."""

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtptrain.decoding.policy import Policy
from mtptrain.kernels.acceptance import Emission, verify_logits


@dataclass(frozen=True, slots=True)
class Draft:
    """What was drafted.

    Attributes:
        tokens_BK: int64; K may be smaller than was asked for, where every row stopped before.
        logits_BKV: what they were drawn from under the policy; None says that each was certain (a greedy draft).
        drafted_B: int64 in [0, K], tokens that count in each row; what follows them holds anything.
    """

    tokens_BK: Tensor
    logits_BKV: Tensor | None
    drafted_B: Tensor

    @classmethod
    def nothing(cls, drafted_B: Tensor) -> Draft:
        """No tokens in any row; drafted_B is 0 throughout."""
        return cls(drafted_B.new_empty(len(drafted_B), 0), None, drafted_B)


def verify(policy: Policy, draft: Draft, logits_BLV: Tensor, u_BL: Tensor | None) -> Emission:
    """Keep what the policy's verification keeps, and take its next token.

    Args:
        policy: of the run.
        draft: with K = L - 1 tokens a row.
        logits_BLV: the backbone's, at the last known token and at each drafted one.
        u_BL: float64 draws, see `Draws.verify`; None for a greedy policy.
    """
    return verify_logits(
        draft.tokens_BK, draft.drafted_B, draft.logits_BKV, logits_BLV, u_BL, policy.sampling, policy.verification
    )
