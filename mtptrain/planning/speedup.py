"""Acceptance length, speed-up and break-even: the same formula for modelled and for measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted gain of K drafts per pass.

    Attributes:
        draft_length: K; 0 is plain decoding.
        acceptance_length: tokens a pass.
        speedup: over plain decoding.
        break_even: acceptance, equal at every position, for a speed-up of 1; None if even full acceptance does not
            pay, and for K = 0.
    """

    draft_length: int
    acceptance_length: float
    speedup: float
    break_even: float | None


def predicted_acceptance_length(conditional: Sequence[float], draft_length: int) -> float:
    """Return the tokens a pass with K drafts, 1 + sum_k prod_{j<=k} c_j.

    Args:
        conditional: c_k in [0, 1], share of drafts kept at position k, given that all earlier ones were kept; later
            positions repeat the last. Must not be empty if K is above 0.
        draft_length: K.
    """
    padded = [conditional[min(k, len(conditional) - 1)] for k in range(draft_length)]
    return 1 + sum(accumulate(padded, mul))


def break_even(cost: float, draft_length: int) -> float | None:
    """Return the acceptance a, equal at every position, with 1 + a + ... + a^K = cost; None if none in [0, 1] fits.

    Args:
        cost: time of a pass with K drafts over the time of a plain pass.
        draft_length: K, at least 1.
    """
    if not 1 <= cost <= draft_length + 1:
        return 0.0 if cost < 1 else None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_acceptance_length([middle], draft_length) < cost else (low, middle)
    return high


def predict_speedups(
    step_seconds: Mapping[int, float], draft_seconds: Mapping[int, float], lengths: Mapping[int, float]
) -> list[Prediction]:
    """Return S(K) = AL(K) t(1) / (t(K + 1) + d(K)) for every K in `lengths`.

    Args:
        step_seconds: t(n), the time of one backbone pass over n new tokens of every row, for n = 1 and every K + 1.
        draft_seconds: d(K), the time of drafting K >= 1 tokens in every row.
        lengths: AL(K), tokens a pass.
    """
    plain = step_seconds[1]
    predictions = []
    for k, length in sorted(lengths.items()):
        cost = (step_seconds[k + 1] + (draft_seconds[k] if k else 0.0)) / plain
        predictions.append(Prediction(k, length, length / cost, break_even(cost, k) if k else None))
    return predictions
