"""Medians of few measurements, with quartiles and an interval that assumes nothing about their distribution."""

from __future__ import annotations

import math

import numpy as np

from mtptrain.evaluation.head_result import Interval
from mtptrain.evaluation.result import Spread

CONFIDENCE = 0.95


def spread(values: list[float]) -> Spread:
    """Return median and quartiles."""
    lower, median, upper = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(median, (lower, upper))


def median_interval(values: list[float]) -> tuple[Interval, float]:
    """Return an interval of the true median, and its confidence: the narrowest that reaches 95 %, or the whole range.

    The median lies outside the r-th smallest and r-th largest of n independent values with the chance that fewer than r
    of them fall on one side of it, 2 P(Binomial(n, 1/2) < r). Three values give 75 %, six 97 %.
    """
    ordered, size = sorted(values), len(values)

    def confidence(rank: int) -> float:
        return 1 - 2 * sum(math.comb(size, below) for below in range(rank)) / 2**size

    rank = max((r for r in range(1, (size + 1) // 2 + 1) if confidence(r) >= CONFIDENCE), default=1)
    return (ordered[rank - 1], ordered[size - rank]), confidence(rank)
