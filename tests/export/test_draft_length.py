from dataclasses import replace

import pytest

from mtptrain.config import ExportTarget, HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.evaluation.head_result import Gain
from mtptrain.evaluation.result import Doubt, Evaluation
from mtptrain.export.draft_length import (
    PlannedLength,
    choose_draft_length,
    fastest_measured,
    fastest_planned,
    own_warnings,
    shown_lengths,
)
from tests.evaluation.recorded import recorded_evaluation

H200 = HardwareConfig(name="h200", memory=1.41e11, bandwidth=4.8e12, fp8_flops=2e15, bf16_flops=1e15, fp32_flops=5e14)


def with_speeds(evaluation: Evaluation, doubts: dict[str, list[Doubt]], slowdown: float = 1.0) -> Evaluation:
    """Return the evaluation with doubts by head, and no others, and changed speed-ups; both at the smallest batch."""
    batch = evaluation.first_batch
    speeds = {
        head: {
            k: replace(speed, doubts=doubts.get(head, []), median=speed.median * slowdown)
            for k, speed in by_length.items()
        }
        for head, by_length in evaluation.speedup[batch].items()
    }
    return replace(evaluation, speedup={**evaluation.speedup, batch: speeds})


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """A recorded evaluation, as if on an idle machine, and 1.5 times as fast as plain decoding."""
    fast = recorded_evaluation()
    best = max(speed.median for speed in fast.speedup[fast.first_batch]["trained"].values())
    return with_speeds(fast, {}, 1.5 / best)


def test_the_measured_length_comes_before_the_planned_one_and_that_before_the_trained_steps() -> None:
    planned = PlannedLength(4, "1 x h200")
    vllm = ExportTarget.vllm
    assert choose_draft_length(vllm, 1, 3, 2, planned).served == 2
    assert choose_draft_length(vllm, 1, 3, None, planned).served == 4
    assert choose_draft_length(vllm, 1, 3, None, planned).reason.startswith("fastest by the plan")
    assert choose_draft_length(vllm, 1, 3, None, None).served == 3


def test_a_plan_without_a_faster_length_is_not_called_a_reason_for_one() -> None:
    least = choose_draft_length(ExportTarget.vllm, 1, 3, None, PlannedLength(0, "1 x h200"))
    reason = "the least: by the plan for 1 x h200, no K is faster than serving without drafts"
    assert (least.served, least.reason) == (1, reason)


def test_a_stacked_head_is_served_at_its_depth_and_shown_up_to_it() -> None:
    assert choose_draft_length(ExportTarget.vllm, 2, 3, 4, PlannedLength(4, "1 x h200")).served == 2
    assert choose_draft_length(ExportTarget.hf, 2, 3, 4, None).served == 4
    assert shown_lengths(ExportTarget.vllm, 2, [1, 2, 3, 4]) == [1, 2]
    assert shown_lengths(ExportTarget.hf, 2, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert shown_lengths(ExportTarget.sglang, 1, [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_a_plan_drafts_more_the_more_is_kept_and_never_beyond_what_was_measured() -> None:
    shape, plan = ShapeConfig(), PlanConfig()
    assert fastest_planned(shape, H200, plan, [1.0, 1.0, 1.0]) == PlannedLength(3, "1 x h200")
    assert fastest_planned(shape, H200, plan, [0.0, None, None]) == PlannedLength(0, "1 x h200")


def test_the_fastest_length_of_an_evaluation_is_that_of_the_trained_head(evaluation: Evaluation) -> None:
    speedups = evaluation.speedup[evaluation.first_batch]["trained"]
    fastest = fastest_measured(evaluation)
    assert fastest is not None
    assert speedups[fastest].median == max(one.median for one in speedups.values())
    assert fastest_measured(None) is None


@pytest.mark.parametrize("head", ["stock", "trained"])
def test_doubtful_speeds_choose_no_length_and_the_export_says_so(evaluation: Evaluation, head: str) -> None:
    doubtful = with_speeds(evaluation, {head: [Doubt.busy]})
    assert fastest_measured(doubtful) is None
    assert own_warnings(doubtful) == [
        *own_warnings(evaluation),
        "the speeds of the run's own evaluation are doubtful (its report says why), so they choose no K",
    ]


def test_a_head_that_its_own_evaluation_finds_no_better_gets_loud_warnings(evaluation: Evaluation) -> None:
    longest = evaluation.draft_length
    clear, unclear = Gain(0.2, (0.1, 0.3), 0.1), Gain(0.0, (-0.1, 0.1), 0.2)
    sound = replace(evaluation, gain={longest: clear}, certificate=replace(evaluation.certificate, passed=True))
    assert own_warnings(sound) == []
    assert own_warnings(None) == []
    (line,) = own_warnings(replace(sound, gain={longest: unclear}))
    assert line.startswith("THE RUN'S OWN EVALUATION shows no gain: no evidence that this head")
    (line,) = own_warnings(with_speeds(sound, {}, 0.5))
    assert line == "in the run's own evaluation, no K was faster than plain decoding"
    (line,) = own_warnings(replace(sound, certificate=replace(sound.certificate, passed=False)))
    assert line.startswith("THE CERTIFICATE")
