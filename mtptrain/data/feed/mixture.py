"""Which source a training row comes from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

GOLDEN, RANGE = 2654435769, 2**32  # the odd number next to the golden section of the range


def source_of(row: int, weights: Sequence[float]) -> int:
    """Index of the source that row `row` of the whole training, from 0, comes from.

    Multiples of the golden section fill [0, 1) evenly, and so do those of every n-th row: after N rows the count of a
    source is its share of N but for a few, in the whole and in each place of the batch. Nothing is drawn or remembered.

    Args:
        row: of all processes together.
        weights: above 0; a source's share is its weight over their sum.

    Source: Kronecker sequence; Niederreiter 1992, section 3.1.
    """
    limits = list(accumulate(weights))
    place = row * GOLDEN % RANGE / RANGE * limits[-1]
    return min(bisect_right(limits, place), len(weights) - 1)
