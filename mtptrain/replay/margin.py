"""How far a greedy draft is from another outcome: computations that round differently part where this is little."""

# R rows, V vocabulary

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_margin(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """Return how far logits must move before the likeliest token becomes or ceases to be a given one.

    Args:
        logits_RV: floating, of the head under the policy.
        token_R: int64, the given tokens.

    Returns:
        float64 [R], the distance from the token's logit to the largest other one; infinite without another.
    """
    token_R1 = token_R.unsqueeze(1)
    others_RV = logits_RV.float().scatter(1, token_R1, float("-inf"))
    return (logits_RV.gather(1, token_R1).squeeze(1).float() - others_RV.amax(-1)).abs().double()


def stop_margin(confidence_R: Tensor, min_confidence: float) -> Tensor:
    """Return how far log-probabilities must move before a draft goes on where it stops, or stops where it goes on.

    Args:
        confidence_R: float64, largest probability of each row at temperature 1.
        min_confidence: threshold below which a draft stops; 0 for none.

    Returns:
        float64 [R]; infinite without a threshold.
    """
    if min_confidence == 0:
        return torch.full_like(confidence_R, math.inf)
    return (confidence_R.log() - math.log(min_confidence)).abs()
