"""Student's distribution, for intervals over few groups of prompts or few runs."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

ANGLES = 10_001  # of the grid that inverts the distribution
NORMAL = 1.959964  # the normal distribution's quantile of 97.5 %


@cache
def student_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's distribution: with t = sqrt(freedom) tan(x), x has the density cos(x)^(freedom-1).

    Args:
        probability: in (0, 1).
        freedom: degrees of freedom, at least 1; infinity gives the normal distribution's.
    """
    freedom = min(freedom, 1e6)  # the normal distribution's to five digits
    edge = min(math.pi / 2, 40 / math.sqrt(freedom))  # beyond it the density is below e^-800
    x_A = np.linspace(-edge, edge, ANGLES)
    middle_A = (x_A[1:] + x_A[:-1]) / 2
    below_A = np.concatenate([[0.0], np.cumsum(np.cos(middle_A) ** (freedom - 1))])
    angle = np.interp(probability, below_A / below_A[-1], x_A)
    return math.sqrt(freedom) * math.tan(float(angle))


def bootstrap_widening(groups: int) -> float:
    """Return the factor by which a 95 % bootstrap interval over few groups is too narrow.

    The spread of resamples is that of n groups divided by n instead of n - 1, and their quantiles are those of the
    normal distribution.

    Args:
        groups: resampled groups, at least 2.

    Source: T. C. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69 (2015) 371,
    section 3.2.
    """
    return student_quantile(0.975, groups - 1) / NORMAL * math.sqrt(groups / (groups - 1))
