"""Simulate how often the 95 % interval of a gain over few groups of prompts covers the truth.

python scripts/interval_coverage.py [TRIES]
"""

# G groups, R resamples

from __future__ import annotations

import sys

import numpy as np

from mtptrain.evaluation.metrics import RESAMPLES, interval, widened

POSSIBLE = (-4.0, 4.0)  # gains at K=4
GROUPS = (1, 2, 3, 4, 6, 8, 12, 18, 64)


def simulate(random: np.random.Generator, groups: int, skewed: bool) -> tuple[np.ndarray, float, np.ndarray]:
    """Return passes and tokens gained of groups whose gain is 0 in the mean, and the ratio of their sums.

    Args:
        random: draws.
        groups: their number.
        skewed: whether the gains are skewed, too.
    """
    passes_G = np.exp(random.normal(0, 0.5, groups)) * 40
    gain_G = random.normal(0, 0.2, groups) + skewed * (random.exponential(0.2, groups) - 0.2)
    return passes_G, float((gain_G * passes_G).sum() / passes_G.sum()), gain_G * passes_G


def coverage(random: np.random.Generator, groups: int, skewed: bool, tries: int) -> tuple[float, float]:
    """Return the shares of percentile and of widened intervals that hold the true gain of 0."""
    times_RG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    covered = np.zeros(2)
    for _ in range(tries):
        passes_G, gain, tokens_G = simulate(random, groups, skewed)
        gain_R = (times_RG @ tokens_G) / (times_RG @ passes_G)
        spans = [interval(gain_R), widened(gain, gain_R, groups, POSSIBLE)]
        covered += [low <= 0 <= high for low, high in spans]
    return float(covered[0] / tries), float(covered[1] / tries)


def main() -> None:
    """Print a Markdown table."""
    tries, random = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, np.random.default_rng(1)
    print("| groups | normal gains: percentiles | widened | skewed gains: percentiles | widened |")
    print("|---|---|---|---|---|")
    for groups in GROUPS:
        shares = [share for skewed in (False, True) for share in coverage(random, groups, skewed, tries)]
        print(f"| {groups} | " + " | ".join(f"{share:.3f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
