import numpy as np
import pytest

from mtptrain.evaluation.metrics import difference, interval, paired_gain, summarize
from mtptrain.replay.replay import Counts


def test_an_interval_leaves_a_fortieth_out_on_either_side() -> None:
    assert interval(np.arange(1001.0)) == (25.0, 975.0)


def test_a_gain_of_2_8_standard_errors_is_found_four_times_in_five() -> None:
    """z of the two-sided 5 % level plus z of 80 % power: 1.960 + 0.842."""
    gain = difference(0.5, np.array([-1.0, 1.0]))
    assert gain.gain == 0.5
    assert gain.detectable == pytest.approx(2.802)


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
