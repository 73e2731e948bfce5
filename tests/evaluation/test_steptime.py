import pytest
import torch

from mtptrain.decoding.draft import Drafter
from mtptrain.evaluation.steptime import DraftStep, StepTimes, VerifyStep, describe_times, measure_steps
from tests.tiny import random_backbone, random_stack

TEXT = [7, 3, 11, 5, 2, 13, 8, 1, 60, 33, 21]


def test_a_timed_pass_starts_from_the_same_state_every_time() -> None:
    step = VerifyStep(random_backbone(), torch.tensor([TEXT, TEXT[::-1]]), most=4)
    first = [step(n) for n in (1, 4, 2)]
    assert [step(n) for n in (1, 4, 2)] == first
    assert [row[:1] for row in first[1]] == first[0]  # a longer pass chooses the same after its first token


def test_timed_drafts_are_those_of_a_drafter_that_reads_the_text_at_once() -> None:
    model, stack = random_backbone(), random_stack(random_backbone())
    text = TEXT * 3
    step = DraftStep(model, stack, text, context=len(TEXT))
    for k in (3, 1, 2):
        drafted = step(k)
        with torch.inference_mode():
            fresh = Drafter(model, stack).draft(text[: step.seen + 1], step.streams_1SND[:, : step.seen], k)
        assert drafted == fresh


def test_every_step_is_timed_as_often_as_was_asked_for() -> None:
    model = random_backbone()
    times = measure_steps(model, random_stack(model), TEXT, longest=3, repetitions=2)
    assert {n: len(seconds) for n, seconds in times.step.items()} == {1: 2, 2: 2, 3: 2, 4: 2}
    assert {k: len(seconds) for k, seconds in times.draft.items()} == {1: 2, 2: 2, 3: 2}
    assert min(seconds for all_of_one in times.step.values() for seconds in all_of_one) > 0


def test_a_prediction_uses_the_times_of_one_repetition_only() -> None:
    # The second repetition ran on a machine that was ten times slower: the speed-up is the same.
    times = StepTimes(1, 96, step={1: [4.0, 40.0], 2: [5.0, 50.0]}, draft={1: [1.0, 10.0]})
    described = describe_times(times, {1: 1.8})
    assert described["predicted_speedup"]["1"] == {"median": pytest.approx(1.2), "quartiles": pytest.approx([1.2, 1.2])}
    assert described["step_seconds"]["2"]["median"] == 27.5
