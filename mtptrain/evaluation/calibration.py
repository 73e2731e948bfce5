"""Calibration of a head's confidence: its largest probability against the acceptance of what it drafted.

The confidence is that of a threshold, the largest probability at temperature 1. The acceptance of a step is the chance
that its token is kept, `min(1, q / p)` at the text's own token: for a greedy draft, whether it is that token; for a
sampled draft, an unbiased sample of sum_v min(p_v, q_v), since the text's token is drawn from p. So for greedy drafts a
calibrated head has confidence = acceptance; for sampled drafts the curve tells what a confidence is worth, and
need not be the diagonal.
"""

# K draft steps, N anchors, X steps of all anchors and traces

from __future__ import annotations

import numpy as np

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.drafts import TraceDrafts
from mtptrain.evaluation.expected import acceptance_probability
from mtptrain.evaluation.head_result import Calibration, CalibrationBin
from mtptrain.evaluation.replay import trace_chances
from mtptrain.kernels.acceptance import Verification

NUM_BINS = 10


def calibrate(drafts: list[TraceDrafts], policy: Policy, draft_length: int) -> Calibration:
    """Return the reliability of the confidence over the steps that decoding verifies, weighted with the chance of each.

    Args:
        drafts: of the traces.
        policy: how drafts are verified and stopped.
        draft_length: K.
    """
    parts = [_steps(one, policy, draft_length) for one in drafts if len(one.p_N)]
    confidence_X, acceptance_X, weight_X = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0))
    bin_X = np.minimum((confidence_X * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = []
    for number in range(NUM_BINS):
        inside_X = bin_X == number
        count = float(weight_X[inside_X].sum())
        if count > 0:
            confidence, acceptance = (
                float((weight_X * values_X)[inside_X].sum() / count) for values_X in (confidence_X, acceptance_X)
            )
            low, high = number / NUM_BINS, (number + 1) / NUM_BINS
            bins.append(CalibrationBin(low, high, count, confidence, acceptance))
    return _pooled(draft_length, bins)


def _steps(drafts: TraceDrafts, policy: Policy, draft_length: int) -> np.ndarray:
    """Confidence, acceptance and weight of every step of a trace, [3, X]."""
    chances = trace_chances(drafts, policy)
    weight_KN = chances.visit_LN[draft_length - 1] * chances.begun_KN[:draft_length]
    accept_KN = acceptance_probability(drafts.p_N, drafts.q_KN[:draft_length], Verification.token)
    return np.stack([drafts.confidence_KN[:draft_length], accept_KN, weight_KN]).reshape(3, -1)


def _pooled(draft_length: int, bins: list[CalibrationBin]) -> Calibration:
    """Means over all bins, and the expected calibration error: the mean distance of a bin from the diagonal."""
    total = sum(one.count for one in bins)
    if total == 0:
        return Calibration(draft_length, ece=None, confidence=None, acceptance=None, bins=bins)
    return Calibration(
        draft_length,
        ece=sum(one.count * abs(one.confidence - one.acceptance) for one in bins) / total,
        confidence=sum(one.count * one.confidence for one in bins) / total,
        acceptance=sum(one.count * one.acceptance for one in bins) / total,
        bins=bins,
    )
