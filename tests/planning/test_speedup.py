import pytest

from mtptrain.planning.speedup import break_even, predict_speedups, predicted_acceptance_length


def test_acceptance_length_sums_the_chances_of_reaching_each_position() -> None:
    # Reported for DeepSeek-V4-Pro at T = 1 with thinking: .79/.61/.46/.23 gives 1.79, 2.27, 2.49 and 2.54.
    lengths = [predicted_acceptance_length([0.79, 0.61, 0.46, 0.23], k) for k in range(5)]
    assert lengths == pytest.approx([1.0, 1.79, 2.27, 2.49, 2.54], abs=0.005)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_draft_kept_is_plain_decoding_and_every_draft_kept_the_ceiling(share: float) -> None:
    assert [predicted_acceptance_length([share], k) for k in range(9)] == [1 + share * k for k in range(9)]


@pytest.mark.parametrize("draft_length", range(1, 9))
@pytest.mark.parametrize("cost", [1.0, 1.3, 1.97])
def test_at_break_even_acceptance_the_speed_up_is_one(draft_length: int, cost: float) -> None:
    share = break_even(cost, draft_length)
    assert share is not None
    times = {1: 1.0, draft_length + 1: cost}
    length = predicted_acceptance_length([share], draft_length)
    (one,) = predict_speedups(times, {draft_length: 0.0}, {draft_length: length})
    assert one.speedup == pytest.approx(1.0, rel=1e-12)


def test_a_pass_that_costs_more_than_all_it_can_emit_never_breaks_even() -> None:
    assert break_even(3.01, 2) is None
    assert break_even(3.0, 2) == pytest.approx(1.0)


def test_a_speed_up_is_length_times_plain_time_over_the_time_of_draft_and_verify() -> None:
    plain, two = predict_speedups({1: 4.0, 3: 6.0}, {2: 2.0}, {0: 1.0, 2: 2.5})
    assert (plain.speedup, plain.break_even) == (1.0, None)
    assert two.speedup == 2.5 * 4.0 / (6.0 + 2.0)
