import pytest

from mtptrain.decoding.results import Decoded, DecodedBatch, Seconds, VerifyPass
from mtptrain.evaluation.speed import BatchRuns, batch_length, summarize_speed


def _row(tokens: int, passes: int) -> Decoded:
    return Decoded(tokens=[7] * tokens, passes=[VerifyPass(1, 1, 2)] * passes)


def _runs(rows: list[tuple[int, int]], seconds: Seconds, plain: Seconds) -> BatchRuns:
    plain_batch = DecodedBatch([_row(tokens, 0) for tokens, _ in rows], plain)
    return BatchRuns(
        [], (plain_batch, plain_batch), {("stock", 1): DecodedBatch([_row(*row) for row in rows], seconds)}
    )


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
