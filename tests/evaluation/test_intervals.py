import numpy as np
import pytest

from mtptrain.evaluation.head_result import Gain
from mtptrain.evaluation.metrics import difference, interval, paired_gain, summarize, widened
from mtptrain.evaluation.runs import gain_of_runs, position_gain_of_runs, summarize_runs
from mtptrain.replay.replay import Counts


def test_an_interval_leaves_a_fortieth_out_on_either_side() -> None:
    assert interval(np.arange(1001.0)) == (25.0, 975.0)


def test_a_gain_of_2_8_standard_errors_is_found_four_times_in_five() -> None:
    """z of the two-sided 5 % level plus z of 80 % power: 1.960 + 0.842."""
    gain = difference(0.5, np.array([-1.0, 1.0]), num_groups=10**6, most=4)
    assert gain.gain == 0.5
    assert gain.detectable == pytest.approx(2.802, rel=1e-5)


def test_a_gain_is_the_other_heads_lead_and_paired() -> None:
    nothing = np.zeros(1)
    base = [Counts(10.0, 10.0 + 3 * number, nothing, nothing, nothing) for number in range(20)]
    other = [Counts(10, one.emitted + 5, nothing, nothing, nothing) for one in base]
    gain = paired_gain(base, other, list(range(20)))
    assert gain.gain == pytest.approx(0.5)
    assert gain.interval == pytest.approx((0.5, 0.5))


def test_a_summary_is_the_ratio_of_sums_not_the_mean_over_prompts() -> None:
    nothing = np.ones(1)
    short, long = Counts(1.0, 4.0, nothing, nothing, nothing), Counts(9.0, 9.0, nothing, nothing, nothing)
    summary = summarize([short, long], [0, 1])
    assert (summary.acceptance_length, summary.passes, summary.emitted) == (13 / 10, 10, 13)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_an_interval_over_few_groups_covers_the_truth(groups: int) -> None:
    """Percentiles alone cover it 50, 77 and 86 times in 100."""
    random, covered = np.random.default_rng(0), 0
    times_RG = random.multinomial(groups, np.full(groups, 1 / groups), 1000) / groups
    for value_G in random.normal(0, 0.2, (400, groups)):
        low, high = widened(float(value_G.mean()), times_RG @ value_G, groups, (-4, 4))
        covered += low <= 0 <= high
    assert 0.90 < covered / 400 < 0.98


def test_one_group_says_nothing_about_others() -> None:
    """Ten prompts of one conversation, each of which gains; and the same with several runs on either side."""
    nothing = np.zeros(2)
    base, other = ([Counts(10.0, emitted, nothing, nothing, nothing)] * 10 for emitted in (12.0, 25.0))
    groups = [0] * 10
    assert summarize(base, groups).interval == (1, 3)
    for gain in (paired_gain(base, other, groups), gain_of_runs([base, base], [other, other], groups)):
        assert gain == Gain(pytest.approx(1.3), (-2, 2), detectable=2)
    pooled = summarize_runs([base, other], groups)
    assert (pooled.acceptance_length, pooled.interval) == (pytest.approx(1.85), (1, 3))


def test_groups_that_nothing_was_measured_on_narrow_no_interval() -> None:
    """Texts that end at their first token have no pass, and few drafts reach a late position."""
    nothing = np.zeros(2)
    empty = Counts(0.0, 0.0, nothing, nothing, nothing)
    rng = np.random.default_rng(0)

    def measured(gain: float) -> list[Counts]:
        return [
            Counts(10.0, 12 + gain + noise, nothing, np.array([10.0, 4 * (i == 0)]), np.array([2.0, gain * (i == 0)]))
            for i, noise in enumerate(rng.normal(0, 1, 5))
        ]

    base, other = ([measured(gain) for _ in range(2)] for gain in (1.0, 3.0))
    with_empty = [[[*run, *[empty] * 20] for run in runs] for runs in (base, other)]
    groups = list(range(25))
    assert gain_of_runs(*with_empty, groups) == gain_of_runs(base, other, groups[:5])
    assert summarize_runs(with_empty[0], groups).interval == summarize_runs(base, groups[:5]).interval
    one = [[[run[0], empty, empty] for run in runs] for runs in (base, other)]
    assert gain_of_runs(*one, [0, 1, 2]).interval == (-2, 2)
    assert position_gain_of_runs(base, other, groups[:5])[1] == Gain(0.5, (-1, 1), detectable=1)
