from dataclasses import replace

import pytest

from mtptrain.certificate.shifted_target import not_tested
from mtptrain.evaluation.certificate_result import Outcome, PassCount, PassCountTest
from mtptrain.evaluation.head_result import SeenPrompts
from mtptrain.evaluation.report.headline import (
    Headline,
    certificate_details,
    certificate_text,
    headline,
    headline_text,
    seen_texts,
    speed_text,
)
from mtptrain.evaluation.result import Spread
from tests.evaluation.recorded import recorded_evaluation
from tests.evaluation.report.changes import (
    only,
    with_failed_certificate,
    with_gain,
    with_seen_prompts,
    with_speedup,
)


@pytest.mark.parametrize(
    ("value", "interval", "expected", "words"),
    [
        (0.35, (0.29, 0.41), Headline.gain, "+0.35 over stock (+0.29 to +0.41)"),
        (0.03, (-0.05, 0.11), Headline.unclear, "no evidence of a gain over stock: +0.03 (-0.05 to +0.11)"),
        (0.03, (0.0, 0.06), Headline.unclear, "no evidence of a gain over stock: +0.03 (+0.00 to +0.06)"),
        (0.0, (0.0, 0.0), Headline.unclear, "no evidence of a gain over stock: +0.00"),
        (-0.2, (-0.31, -0.09), Headline.loss, "a loss of 0.20 against stock (-0.31 to -0.09)"),
    ],
)
def test_headline_follows_the_interval_of_the_gain(
    value: float, interval: tuple[float, float], expected: Headline, words: str
) -> None:
    evaluation = with_gain(recorded_evaluation(), value, interval)
    assert headline(evaluation) is expected
    text = headline_text(evaluation)
    assert text.startswith("trained head: 1.67 tokens a verify pass at K=3 (1.50 to 1.86), ")
    assert words in text


def test_headline_is_about_the_longest_draft_even_where_a_shorter_one_gains() -> None:
    evaluation = with_gain(recorded_evaluation(), -0.2, (-0.31, -0.09))
    assert headline(with_gain(evaluation, 0.5, (0.4, 0.6), length=1)) is Headline.loss


@pytest.mark.parametrize("name", ["stock", "trained"])
def test_headline_of_one_head_claims_no_gain(name: str) -> None:
    evaluation = only(recorded_evaluation(), name)
    assert headline(evaluation) is Headline.single
    assert headline_text(evaluation).startswith(f"{name} head: ")
    assert "no other head to compare" in headline_text(evaluation)


def test_headline_of_a_failed_certificate_withdraws_the_figures() -> None:
    evaluation = with_failed_certificate(recorded_evaluation())
    assert headline(evaluation) is Headline.failed
    assert headline_text(evaluation).startswith("CERTIFICATE FAILED, these figures do not count: ")


def test_speed_text_names_the_fastest_draft_length_or_that_none_gains() -> None:
    evaluation = recorded_evaluation()
    assert "1.08x at K=1 (quartiles 1.01 to 1.08) against plain decoding, 93.7 tokens/s" in speed_text(evaluation)
    slower = with_speedup(evaluation, 1, Spread(0.54, (0.5, 0.55)))
    assert "no K is faster than plain decoding" in speed_text(slower)
    assert "the best is 0.88x at K=2" in speed_text(slower)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (SeenPrompts(8, 8, 0), []),
        (SeenPrompts(8, 8, 3), ["the trained head saw 3 of 8 prompts in training"]),
        (
            SeenPrompts(8, 6, 3),
            ["the trained head saw 3 of 6 prompts in training (2 more could not be looked up)"],
        ),
    ],
)
def test_prompts_that_were_seen_in_training_are_told(seen: SeenPrompts, expected: list[str]) -> None:
    assert seen_texts(recorded_evaluation()) == []
    assert seen_texts(with_seen_prompts(recorded_evaluation(), seen)) == expected


def test_certificate_text_of_a_sampled_run_counts_the_tests_of_its_passes() -> None:
    text = certificate_text(recorded_evaluation("sampled").certificate)
    assert text.startswith("output identical to plain greedy 4/4; replay = loop 4/4; ")
    assert text.endswith("pass counts of sampled loops passed (6 tests); sampler passed; controls passed")


def test_a_certificate_that_passed_has_no_details() -> None:
    assert certificate_details(recorded_evaluation("sampled").certificate) == []


def test_certificate_details_name_the_failed_parts() -> None:
    certificate = recorded_evaluation("sampled").certificate
    sampler, controls = certificate.sampler, certificate.controls
    block = replace(sampler.block, passed=False, statistic=99.5, dof=40, p_value=1e-6)
    leaking = replace(
        controls.shifted_target["stock"], outcome=Outcome.failed, shifted=0.9, chance=0.0125, p_value=1e-5
    )
    shifted = {**controls.shifted_target, "stock": leaking}
    count = PassCount(
        head="stock", draft_length=2, runs=9, passes=90, expected=70.25, standard_error=3.0, z=6.6, p_value=1e-9
    )
    failed = replace(
        certificate,
        passed=False,
        pass_count_test=PassCountTest(passed=False, level=1e-4, tests=[count]),
        sampler=replace(sampler, passed=False, block=block),
        controls=replace(controls, passed=False, shifted_target=shifted),
    )
    assert "pass counts of sampled loops FAILED (1 tests); sampler FAILED; controls FAILED" in certificate_text(failed)
    assert certificate_details(failed) == [
        "stock head, K=2: 90 passes in the loop, 70.2 expected, p=1.0e-09",
        "sampler, block verification: chi-square 99.5 at 40 degrees of freedom, p=1.0e-06",
        "control failed: shifted target of the stock head: drafts agree 0.900 with tokens that they cannot know "
        "(chance 0.013, p=1.0e-05)",
    ]


def test_certificate_text_says_which_control_was_not_tested() -> None:
    certificate = recorded_evaluation().certificate
    shifted = dict.fromkeys(certificate.controls.shifted_target, not_tested(1))
    text = certificate_text(replace(certificate, controls=replace(certificate.controls, shifted_target=shifted)))
    assert text.endswith("controls passed (shifted target not tested: the texts are too few or too much alike)")
