"""Differences between two computations of the same logits, judged by the rounding noise of this run."""

# N emitted tokens

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtptrain.certificate.rounding import Logits, largest, typical
from mtptrain.evaluation.certificate_result import (
    LogitComparison,
    NoiseLevel,
    Outcome,
    Quantity,
    RoundingNoise,
    SizeLevel,
    SizeTest,
)


@dataclass(frozen=True, slots=True)
class Differences:
    """Differences of one quantity between two computations, text by text.

    Attributes:
        of, against: the two computations, in words.
        quantity: the compared quantity.
        texts: differences along each text.
        noise: level of the rounding noise of this quantity.
        disturbed: texts behind the noise.
    """

    of: str
    against: str
    quantity: Quantity
    texts: list[np.ndarray]
    noise: NoiseLevel
    disturbed: int


def most_by_chance(chance: float, count: int, level: float) -> int:
    """Return the smallest number of `count` events, each of this chance, that more of occur at most with `level`."""
    tail = 0.0
    for most in range(count, 0, -1):
        tail += math.comb(count, most) * chance**most * (1 - chance) ** (count - most)
        if tail > level:
            return most
    return 0


def judge(one: Differences, level: float) -> LogitComparison:
    """Return the comparison; it fails if more texts lie beyond the noise than chance allows at `level`."""
    typical_test = _judge_sizes([typical(text) for text in one.texts], one.noise.typical, one.disturbed, level / 2)
    largest_test = _judge_sizes([largest(text) for text in one.texts], one.noise.largest, one.disturbed, level / 2)
    outcomes = {typical_test.outcome, largest_test.outcome}
    return LogitComparison(
        of=one.of,
        against=one.against,
        quantity=one.quantity,
        texts=len(one.texts),
        typical=typical_test,
        largest=largest_test,
        outcome=next(one for one in (Outcome.failed, Outcome.passed, Outcome.not_tested) if one in outcomes),
    )


def _judge_sizes(sizes: list[float], noise: SizeLevel, disturbed: int, level: float) -> SizeTest:
    beyond = sum(size > noise.bound for size in sizes)
    chance = (noise.beyond + 0.5) / (disturbed + 1)  # Jeffreys' estimate: never 0
    budget = most_by_chance(chance, len(sizes), level)
    outcome = Outcome.not_tested if budget >= len(sizes) else Outcome.passed
    if beyond > budget:
        outcome = Outcome.failed
    return SizeTest(float(np.median(sizes)) if sizes else 0.0, noise.bound, beyond, budget, outcome)


def both_quantities(
    of: str, against: str, pairs: Sequence[tuple[Logits, Logits]], noise: RoundingNoise
) -> tuple[Differences, Differences]:
    """Return the differences of both quantities between pairs of computed logits."""
    gaps = [left.gap_N - right.gap_N for left, right in pairs]
    log_ps = [left.log_p_N - right.log_p_N for left, right in pairs]
    return (
        Differences(of, against, Quantity.gap, gaps, noise.gap, noise.texts),
        Differences(of, against, Quantity.log_probability, log_ps, noise.log_probability, noise.texts),
    )
