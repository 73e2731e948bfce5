from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mtptrain.backbone.traced import _Shared
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Decoded, DecodedBatch, Limits, Seconds, VerifyPass
from mtptrain.decoding.speculative import Decoding, begin_decoding
from mtptrain.evaluation import speedup
from mtptrain.evaluation.median import median_interval
from mtptrain.evaluation.plausibility import find_doubts, is_busy, summarize_heads
from mtptrain.evaluation.result import Doubt, MachineLoad
from mtptrain.evaluation.speedup import BatchRuns, Spent, batch_length, machine_load, summarize_speed, timed
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.tiny import random_stack, three_layers


def _row(tokens: int, passes: int) -> Decoded:
    return Decoded(tokens=[7] * tokens, passes=[VerifyPass(1, 1, 2)] * passes)


IDLE = Spent(wall=1.0, processor=1.0, load=0.5)


def _runs(rows: list[tuple[int, int]], seconds: Seconds, plain: Seconds, spent: Spent = IDLE) -> BatchRuns:
    plain_batch = DecodedBatch([_row(tokens, 0) for tokens, _ in rows], plain)
    decoded = {("stock", 1): DecodedBatch([_row(*row) for row in rows], seconds)}
    return BatchRuns([], (plain_batch, plain_batch), decoded, (spent, spent), {("stock", 1): spent}, True)


def _with_trained(run: BatchRuns, row: tuple[int, int], seconds: Seconds) -> BatchRuns:
    """The same batch with another head."""
    decoded = {**run.speculative, ("trained", 1): DecodedBatch([_row(*row)], seconds)}
    return replace(run, speculative=decoded, speculative_spent={**run.speculative_spent, ("trained", 1): IDLE})


def test_one_rows_tokens_a_pass_are_its_acceptance_length() -> None:
    assert batch_length([_runs([(9, 5)], Seconds(1), Seconds(1))], "stock", 1) == pytest.approx(8 / 5)


def test_a_batch_waits_for_the_row_with_most_passes() -> None:
    assert batch_length([_runs([(9, 4), (9, 8)], Seconds(1), Seconds(1))], "stock", 1) == pytest.approx(1)


def test_a_batch_of_ended_rows_waits_in_plain_decoding_too() -> None:
    assert batch_length([_runs([(9, 4), (5, 4)], Seconds(1), Seconds(1))], "stock", 1) == pytest.approx(2)


def test_the_ratio_after_the_prefill_leaves_its_time_out_of_both() -> None:
    run = _runs([(9, 4)], Seconds(total=3, prefill=1), Seconds(total=5, prefill=1))
    speedup = summarize_speed([run, run], "stock", 1)
    assert speedup.median == pytest.approx(5 / 3)
    assert speedup.after_prefill.median == pytest.approx(4 / 2)


def test_a_speed_up_that_its_acceptance_allows_is_not_doubted() -> None:
    """8 tokens in 5 passes, 1.6 a pass."""
    run = _runs([(9, 5)], Seconds(1), Seconds(1.5))
    assert find_doubts([run] * 3, "stock", 1, ["stock"]) == []


@pytest.mark.parametrize("seconds", [Seconds(1), Seconds(total=1.7, prefill=1.2)])
def test_a_speed_up_above_the_acceptance_length_is_doubted(seconds: Seconds) -> None:
    """With the prefill, or without it."""
    run = _runs([(9, 5)], seconds, replace(seconds, total=seconds.prefill + 1.7 * (seconds.total - seconds.prefill)))
    assert find_doubts([run] * 3, "stock", 1, ["stock"]) == [Doubt.above_acceptance_length]


@pytest.mark.parametrize(
    ("seconds", "doubts"), [(0.75, []), (0.72, []), (0.6, [Doubt.ratio_of_heads]), (1.0, [Doubt.ratio_of_heads])]
)
def test_heads_of_equal_cost_differ_as_their_acceptance_does(seconds: float, doubts: list[Doubt]) -> None:
    """8 tokens in 4 passes against 8 in 3: the trained head needs 0.75 of the time."""
    run = _with_trained(_runs([(9, 4)], Seconds(1), Seconds(1.2)), (9, 3), Seconds(seconds))
    assert find_doubts([run] * 3, "trained", 1, ["stock", "trained"]) == doubts
    assert find_doubts([run] * 3, "trained", 1, ["trained"]) == []  # heads of other cost are not compared
    assert summarize_heads([run] * 3, {"stock": 1, "trained": 1}, [1])["stock"][1].doubts == doubts
    assert summarize_heads([run] * 3, {"stock": 1, "trained": 2}, [1])["stock"][1].doubts == []


@pytest.mark.parametrize(
    ("spent", "busy"),
    [
        (Spent(1, 1, 0.5), False),
        (Spent(1, 3.9, 4), False),  # several threads
        (Spent(1, 0.8, 0.5), True),  # others had the processor
        (Spent(1, 1, 1e6), True),  # more waiting processes than cores
        (Spent(1, 1, None), False),
    ],
)
def test_a_busy_machine_is_noticed_by_its_processor_time_or_load(spent: Spent, busy: bool) -> None:
    run = _runs([(9, 5)], Seconds(1), Seconds(1.5), replace(spent, load=spent.load and min(spent.load, 1e6)))
    assert is_busy(machine_load([run])) == (busy or (spent.load or 0) > machine_load([run]).cores)
    assert (Doubt.busy in find_doubts([run] * 3, "stock", 1, ["stock"])) == is_busy(machine_load([run]))


def test_on_a_gpu_the_processor_time_says_nothing() -> None:
    run = replace(_runs([(9, 5)], Seconds(1), Seconds(1.5), Spent(1, 0.1, None)), on_processor=False)
    assert machine_load([run]).processor_share is None
    assert summarize_speed([run], "stock", 1).processor is None
    assert not is_busy(machine_load([run]))


def test_the_ratio_in_processor_time_stands_beside_the_clocks() -> None:
    run = _runs([(9, 5)], Seconds(1), Seconds(1.5))
    run = replace(
        run, plain_spent=(Spent(6, 1.5, 0), Spent(6, 1.5, 0)), speculative_spent={("stock", 1): Spent(1, 1, 0)}
    )
    speed = summarize_speed([run] * 3, "stock", 1)
    assert speed.median == pytest.approx(1.5)
    assert speed.processor is not None
    assert speed.processor.median == pytest.approx(1.5)
    assert is_busy(machine_load([run]))


def test_a_stopped_clock_does_not_end_a_run() -> None:
    speed = summarize_speed([_runs([(9, 5)], Seconds(0), Seconds(0))], "stock", 1)
    assert 0 < speed.median < float("inf")


def test_work_is_timed_on_the_clock_and_on_the_processor() -> None:
    def work() -> DecodedBatch:
        return DecodedBatch([_row(sum(range(200_000)) % 2 + 1, 1)], Seconds(1))

    _, spent = timed(work)
    assert spent.processor > 0
    assert spent.wall > 0


@pytest.mark.parametrize(
    ("count", "interval", "confidence"), [(1, (0, 0), 0), (3, (0, 2), 0.75), (6, (0, 5), 0.96875), (12, (2, 9), 0.9614)]
)
def test_the_interval_of_a_median_is_exact(count: int, interval: tuple[int, int], confidence: float) -> None:
    found, level = median_interval([float(value) for value in reversed(range(count))])
    assert found == interval
    assert level == pytest.approx(confidence, abs=1e-3)


def test_load_is_compared_with_all_cores_of_the_machine() -> None:
    assert not is_busy(MachineLoad(processor_share=1.0, load=7.5, cores=8))
    assert is_busy(MachineLoad(processor_share=1.0, load=8.5, cores=8))


def test_processor_time_leaves_out_that_of_recording_and_not_its_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Shared, "seconds", 0.0)

    def record() -> DecodedBatch:
        _Shared.seconds += 60.0  # on a busy machine
        return DecodedBatch([_row(9, 5)], Seconds(1))

    assert timed(record)[1].processor >= 0


@pytest.mark.parametrize("on_processor", [False, True])
def test_a_gpu_begins_every_way_of_decoding_once_before_any_is_timed(
    on_processor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, events = three_layers(vocab_size=7), []

    def begin(*arguments: Any) -> Decoding:
        events.append(("begun", arguments[3]))
        return begin_decoding(*arguments)

    def time(work: Callable[[], DecodedBatch]) -> tuple[DecodedBatch, Spent]:
        events.append(("timed", None))
        return timed(work)

    monkeypatch.setattr(speedup, "_is_on_processor", lambda _: on_processor)
    monkeypatch.setattr(speedup, "begin_decoding", begin)
    monkeypatch.setattr(speedup, "timed", time)
    batches = [[Trace(Prompt([5, 1, 4, 3], "text", 0), [], [], [])]] * 2
    stacks = {"head": random_stack(model)}
    speedup.run_interleaved(model, stacks, batches, [2], Limits(5), GREEDY, 0, lambda *_: None)
    assert events == [("begun", 0), ("begun", 2)] * (not on_processor) + [("timed", None)] * 6
