"""The test of the number of passes fails for numbers that chance does not give, and for those alone."""

import math

import pytest

from mtptrain.certificate.sampled import LEVEL, SampledRun, certify_pass_counts


def runs(length: int, z: float) -> list[SampledRun]:
    """Hundred loops of draft length `length` whose passes lie z standard errors above the expected ones."""
    return [SampledRun("h", length, 10, 10 - z / 10, 1.0)] * 100


@pytest.mark.parametrize("z", [-5.0, 5.0])
def test_too_few_passes_fail_like_too_many(z: float) -> None:
    result = certify_pass_counts(runs(1, z))
    assert result.tests[0].z == pytest.approx(z)
    assert result.tests[0].p_value == pytest.approx(2 * 2.8665e-7, rel=1e-4)  # twice the upper tail of five
    assert not result.passed


def test_the_level_holds_for_all_tests_together() -> None:
    """A p-value between LEVEL / 4 and LEVEL fails a test that stands alone, and passes among four."""
    lone = certify_pass_counts(runs(1, 4.0))
    assert LEVEL / 4 < lone.tests[0].p_value < LEVEL
    assert not lone.passed
    assert certify_pass_counts([run for length in range(1, 5) for run in runs(length, 4.0 * (length == 1))]).passed


def test_heads_and_draft_lengths_are_tested_apart() -> None:
    result = certify_pass_counts([*runs(1, 5.0), *runs(2, -5.0)])
    assert [(test.draft_length, round(test.z or math.nan, 6)) for test in result.tests] == [(1, 5.0), (2, -5.0)]


def test_the_errors_of_loops_add_up_as_variances() -> None:
    (test,) = certify_pass_counts([SampledRun("h", 1, 3, 2.0, 9.0), SampledRun("h", 1, 5, 5.0, 16.0)]).tests
    assert (test.passes, test.expected, test.standard_error) == (8, 7.0, 5.0)
