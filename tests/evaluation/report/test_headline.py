from dataclasses import replace

import pytest

from mtptrain.certificate.shifted_target import not_tested
from mtptrain.config import PastDepth
from mtptrain.evaluation.certificate_result import Outcome, PassCount, PassCountTest
from mtptrain.evaluation.head_result import ChosenOn, SeenPrompts
from mtptrain.evaluation.report.headline import (
    Headline,
    certificate_details,
    certificate_text,
    chosen_texts,
    headline,
    headline_text,
    policy_text,
    seen_texts,
    speed_text,
)
from mtptrain.evaluation.result import Doubt, MachineLoad, Spread
from tests.evaluation.recorded import recorded_evaluation
from tests.evaluation.report.changes import (
    DIFFERENCE,
    PASS_DIFFERENCE,
    only,
    quiet,
    with_doubts,
    with_failed_certificate,
    with_gain,
    with_head,
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
    text, measured = headline_text(evaluation), evaluation.last_head.replay[3]
    low, high = measured.interval
    figures = f"{measured.acceptance_length:.2f} tokens a pass at K=3 ({low:.2f} to {high:.2f})"
    assert text.startswith(f"trained head: {figures}, ")
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
    evaluation = replace(quiet(recorded_evaluation()), plain_tokens_per_second={1: 93.7, 2: 150.0})
    for length, speed in ((1, Spread(1.08, (0.93, 1.09))), (2, Spread(0.88, (0.8, 0.9))), (3, Spread(0.6, (0.5, 0.7)))):
        evaluation = with_speedup(evaluation, length, speed)
    assert "1.08x at K=1 (75 % interval 0.93 to 1.09) against plain decoding, 93.7 tokens/s" in speed_text(evaluation)
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


@pytest.mark.parametrize(
    ("doubt", "words"),
    [
        (Doubt.above_acceptance_length, "is more than the acceptance length, which cannot be"),
        (Doubt.ratio_of_heads, "differ by a factor that their acceptance cannot give"),
        (Doubt.busy, "the machine was busy (71 % of a processor, load 3.2 on 2 cores)"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_doubt_is_told_and_one_at_the_smallest_batch_names_no_fastest_k(doubt: Doubt, words: str, batch: int) -> None:
    evaluation = with_doubts(with_speedup(quiet(recorded_evaluation()), 1, Spread(1.08, (1.0, 1.1))), 2, [doubt], batch)
    loads = dict.fromkeys(evaluation.machine, MachineLoad(processor_share=0.71, load=3.2, cores=2))
    text = speed_text(replace(evaluation, machine=loads))
    assert words in text
    assert text.startswith("on the clock: no K is named as the fastest, because ") == (batch == 1)
    assert ("the fastest of the K measured; doubtful elsewhere, because " in text) == (batch == 2)


def test_certificate_text_of_a_sampled_run_counts_the_tests_of_its_passes() -> None:
    certificate = recorded_evaluation("sampled").certificate
    text, compared = certificate_text(certificate), certificate.greedy_identity.compared
    same = f"{compared}/{compared}"
    assert text.startswith(f"output identical to plain greedy {same}; replay = loop {same}; logits passed (")
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


def test_logits_of_too_few_prompts_are_not_said_to_have_passed() -> None:
    certificate = recorded_evaluation().certificate
    untested = [replace(one, outcome=Outcome.not_tested) for one in certificate.logits.comparisons]
    text = certificate_text(replace(certificate, logits=replace(certificate.logits, comparisons=untested)))
    assert "; logits not tested: too few different prompts; " in text
    untested[0] = replace(untested[0], outcome=Outcome.passed)
    text = certificate_text(replace(certificate, logits=replace(certificate.logits, comparisons=untested)))
    assert f"; logits passed ({len(untested)} comparisons, {len(untested) - 1} not tested); " in text


def test_certificate_details_name_too_many_ties_and_other_logits() -> None:
    certificate = recorded_evaluation().certificate
    ties = [replace(DIFFERENCE, position=position, gap=1e-6) for position in range(3)]
    greedy = replace(certificate.greedy_identity, passed=False, near_ties=ties, tie_budget=2)
    first = certificate.logits.comparisons[0]
    largest = replace(first.largest, median=0.03, beyond=4, outcome=Outcome.failed)
    logits = replace(certificate.logits, comparisons=[replace(first, largest=largest, outcome=Outcome.failed)])
    lines = certificate_details(replace(certificate, greedy_identity=greedy, logits=logits))
    assert lines[:2] == [
        "3 near ties, and the rounding noise explains at most 2",
        "plain decoding against transformers' forward: the largest difference of the gap along a text is 3.0e-02, "
        f"bound {largest.bound:.1e}; 4 of {first.texts} texts beyond it and {largest.budget} by chance",
    ]


def test_near_ties_of_drafts_are_counted_and_named() -> None:
    certificate = recorded_evaluation().certificate
    replay = certificate.replay_equals_loop
    tied = replace(replay, equal=replay.equal - 1, near_ties=[replace(PASS_DIFFERENCE, margin=0.0625)], ties=1)
    text = certificate_text(replace(certificate, replay_equals_loop=replace(tied, tie_budget=3)))
    assert f"replay = loop {replay.compared - 1}/{replay.compared} (1 near tie); " in text
    lines = certificate_details(replace(certificate, replay_equals_loop=tied))
    assert lines == [
        "1 near ties of drafts, and the rounding noise explains at most 0",
        "stock head, prompt 5, K=1: near tie of a draft, margin 6.2e-02; 21 passes in the loop, 22 in the replay",
    ]


def test_a_text_that_goes_on_is_named_as_such() -> None:
    certificate = recorded_evaluation().certificate
    greedy = replace(certificate.greedy_identity, differences=[replace(DIFFERENCE, gap=None)])
    (line,) = certificate_details(replace(certificate, greedy_identity=greedy))
    assert line.endswith("other token than plain greedy at position 17, where one of the two texts ends")


def test_a_policy_is_told_with_every_choice_that_has_an_effect() -> None:
    greedy = recorded_evaluation().policy
    assert policy_text(greedy) == "temperature 0"
    assert policy_text(replace(greedy, repetition_penalty=1.2)) == "temperature 0, repetition_penalty 1.2"
    sampled = replace(recorded_evaluation("sampled").policy, top_k=20, past_depth=PastDepth.stop)
    expected = "temperature 1, sampled drafts, token verification, top_k 20, past_depth stop"
    assert policy_text(sampled) == expected


def test_a_head_that_was_chosen_on_the_prompts_is_named() -> None:
    evaluation = recorded_evaluation()
    assert chosen_texts(evaluation) == []
    for shared, expected in (
        (0, []),
        (5, ["the trained head was chosen as the best of its run on 5 of these 8 prompts"]),
    ):
        chosen = replace(
            evaluation.last_head, chosen_on=ChosenOn(prompts=8, shared=shared, by="replay/expected_length_3")
        )
        texts = chosen_texts(with_head(evaluation, chosen))
        assert [text.partition(",")[0] for text in texts] == expected
