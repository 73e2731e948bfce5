"""Uncertainty over prompts: resampling whole groups of them, the same groups for every head."""

# P prompts, G groups, R resamples, F counts of a prompt

from __future__ import annotations

import numpy as np

from mtptrain.evaluation.head_result import Gain, Interval

RESAMPLES = 2000
DETECTABLE = 1.960 + 0.842  # standard errors: two-sided 5 % level, 80 % power


def resampled_totals(counts_PF: np.ndarray, groups: list[int]) -> np.ndarray:
    """Totals of bootstrap samples of groups, float64 [R, F]; prompts of one group come and go together.

    The draws depend on the number of groups alone, so totals of two heads on the same prompts are paired.

    Args:
        counts_PF: counts of every prompt.
        groups: the group of every prompt; groups are independent of each other.
    """
    numbers, group_P = np.unique(groups, return_inverse=True)
    counts_GF = np.zeros((len(numbers), counts_PF.shape[1]))
    np.add.at(counts_GF, group_P, counts_PF)
    size = len(numbers)
    times_RG = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return times_RG @ counts_GF


def interval(values_R: np.ndarray) -> Interval:
    """Return the 95 % percentile interval."""
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def difference(value: float, resampled_R: np.ndarray) -> Gain:
    """Return a paired difference, from its value and its resamples."""
    return Gain(value, interval(resampled_R), detectable=float(DETECTABLE * resampled_R.std()))
