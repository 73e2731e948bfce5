import pytest
import torch

from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.evaluation.speed import StepBench, StepTimes, describe_times, measure_steps
from tests.tiny import random_backbone, random_stack

TEXT = [7, 3, 11, 5, 2, 13, 8, 1, 60, 33, 21]
MODEL = random_backbone()
STACK = random_stack(MODEL)


def test_a_timed_pass_starts_from_the_same_state_every_time() -> None:
    bench = StepBench(MODEL, STACK, [TEXT, TEXT[::-1]], 3, Limits(4))
    first = [bench.verify(n) for n in (1, 4, 2)]
    assert [bench.verify(n) for n in (1, 4, 2)] == first
    assert [row[:1] for row in first[1]] == first[0]  # a longer pass chooses the same after its first token


def test_timed_drafts_are_those_of_the_loop() -> None:
    class Recording(MtpProposer):
        def draft(self, u_BK: torch.Tensor | None):  # noqa: ANN202
            self.first = super().draft(u_BK)
            return self.first

    proposer = Recording(MODEL, STACK)
    # The loop drafts after the token that the prefill emits: bench the text with that token.
    prompt, emitted = TEXT, decode_speculative(MODEL, proposer, [TEXT], 3, Limits(2)).rows[0].tokens[0]
    bench = StepBench(MODEL, STACK, [[*prompt, emitted]], 3, Limits(2))
    assert bench.draft(3) == proposer.first.tokens_BK.tolist()
    assert bench.draft(1) == proposer.first.tokens_BK[:, :1].tolist()


def test_every_step_is_timed_in_every_repetition() -> None:
    times = measure_steps(MODEL, STACK, [TEXT, TEXT], 3, Limits(4), repetitions=2)
    assert (times.batch, times.context) == (2, len(TEXT))
    assert {n: len(seconds) for n, seconds in times.step.items()} == {1: 2, 2: 2, 3: 2, 4: 2}
    assert {k: len(seconds) for k, seconds in times.draft.items()} == {1: 2, 2: 2, 3: 2}
    assert min(seconds for all_of_one in times.step.values() for seconds in all_of_one) > 0


def test_a_prediction_uses_the_times_of_one_repetition_only() -> None:
    # The second repetition ran on a machine that was ten times slower: the speed-up is the same.
    times = StepTimes(1, 96, step={1: [4.0, 40.0], 2: [5.0, 50.0]}, draft={1: [1.0, 10.0]})
    described = describe_times(times, {1: 1.8})
    predicted = described.predicted_speedup[1]
    assert [predicted.median, *predicted.quartiles] == pytest.approx([1.2] * 3)
    assert described.step_seconds[2].median == 27.5
