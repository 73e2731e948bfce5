"""Intervals over seeds and prompts cover the truth as often as they say."""

import numpy as np
import pytest

from mtptrain.evaluation.crossed import Setting, crossed_gain, crossed_interval
from mtptrain.evaluation.metrics import interval, resampled_totals
from mtptrain.evaluation.student_t import student_quantile

TABULATED = {1: 12.7062, 2: 4.3027, 3: 3.1824, 10: 2.2281, 60: 2.0003, 1e9: 1.9600}


@pytest.mark.parametrize("freedom", TABULATED)
def test_a_quantile_of_student_equals_a_tabulated_value(freedom: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(TABULATED[freedom], rel=1e-4)


ANY = (-100.0, 100.0)
SIZES = [1, 2, 1, 3] * 6  # prompts of each group
GROUPS = np.repeat(range(len(SIZES)), SIZES).tolist()
TRIES = 300


def simulated(
    random: np.random.Generator, runs: int, group_1G: np.ndarray, seed: float, both: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and passes [S, P] of runs whose rates are 2 plus effects.

    Args:
        random: draws.
        runs: their number.
        group_1G: effects of the groups of prompts, which heads on the same prompts share.
        seed, both: standard deviations of the effects of runs, and of runs and groups together.
    """
    effect_SG = random.normal(0, seed, (runs, 1)) + group_1G + random.normal(0, both, (runs, len(SIZES)))
    passes_SG = np.broadcast_to(random.uniform(10, 30, (1, len(SIZES))), effect_SG.shape)
    rate_SP, passes_SP = (np.repeat(one, SIZES, axis=1) for one in (2 + effect_SG, passes_SG))
    return rate_SP * passes_SP, passes_SP


# The truth is missed 5 times in 100 or, if three runs differ by more than the prompts do, 7 times.
@pytest.mark.parametrize("runs", [3, 8])
@pytest.mark.parametrize(("seed", "group", "both"), [(0.1, 0.3, 0.1), (0.2, 0.1, 0.02), (0.0, 0.3, 0.1)])
def test_intervals_over_seeds_and_prompts_cover_the_truth(runs: int, seed: float, group: float, both: float) -> None:
    random, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(TRIES):
        group_1G = random.normal(0, group, (1, len(SIZES)))
        base, other = (Setting.of(*simulated(random, runs, group_1G, seed, both), GROUPS) for _ in range(2))
        spans = [crossed_gain(base, other, 100).interval, crossed_interval(other, ANY)]
        covered += [low <= truth <= high for truth, (low, high) in zip((0, 2), spans, strict=True)]
    assert covered.min() / TRIES > 0.90


def test_a_bootstrap_of_prompts_alone_misses_the_variation_of_seeds() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        n_SP, d_SP = simulated(random, 3, random.normal(0, 0.1, (1, len(SIZES))), 0.2, 0.02)
        totals_RF = resampled_totals(np.stack([n_SP.mean(0), d_SP.mean(0)], axis=1), GROUPS)
        low, high = interval(totals_RF[:, 0] / totals_RF[:, 1])
        covered += low <= 2 <= high
    assert covered / 200 < 0.6


def test_one_run_of_each_setting_has_the_variation_of_prompts_alone() -> None:
    random = np.random.default_rng(3)
    n_SP, d_SP = simulated(random, 1, random.normal(0, 0.3, (1, len(SIZES))), 0.0, 0.0)
    low, high = crossed_interval(Setting.of(n_SP, d_SP, GROUPS), ANY)
    totals_RF = resampled_totals(np.stack([n_SP[0], d_SP[0]], axis=1), GROUPS)
    assert (low, high) == pytest.approx(interval(totals_RF[:, 0] / totals_RF[:, 1]), abs=0.05)


def test_the_mean_is_that_of_the_runs_and_equal_runs_have_no_spread_of_seeds() -> None:
    n_SP, d_SP = np.array([[4.0, 9.0], [2.0, 6.0]]), np.array([[2.0, 3.0], [2.0, 2.0]])
    setting = Setting.of(n_SP, d_SP, [0, 1])
    assert setting.runs_S == pytest.approx([13 / 5, 8 / 4])
    assert setting.mean == pytest.approx(2.3)
    same = Setting.of(n_SP[[0, 0, 0]], d_SP[[0, 0, 0]], [0, 1])
    alone = crossed_interval(Setting.of(n_SP[:1], d_SP[:1], [0, 1]), ANY)
    assert crossed_interval(same, ANY) == pytest.approx(alone)
    assert crossed_gain(same, same, 100).interval == pytest.approx((0.0, 0.0))
