import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtptrain.data.prompts import Prompt
from mtptrain.evaluation.expected import acceptance_probability, expected_passes
from mtptrain.evaluation.metrics import by_position
from mtptrain.evaluation.replay import replay_passes
from mtptrain.evaluation.trace import Trace
from mtptrain.kernels.acceptance import Verification
from tests.kernels.enumerable import decoded_texts, random_world

# K draft steps, N tokens that passes emit.
VERIFICATIONS = list(Verification)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 8), num_tokens=st.integers(0, 30), seed=st.integers(0, 99))
def test_zeros_and_ones_give_the_counts_of_greedy_replay(steps: int, num_tokens: int, seed: int) -> None:
    prompt = 3
    hit_KS = np.random.default_rng(seed).random((steps, prompt + num_tokens + 1)) < 0.7
    trace = Trace(Prompt([0] * prompt, "text", 0), [0] * (num_tokens + 1), [0.0] * (num_tokens + 1), [])
    expected = expected_passes(hit_KS[:, prompt - 1 : prompt - 1 + num_tokens])
    for length in range(1, steps + 1):
        passes = replay_passes(hit_KS, trace, length)
        counts = by_position([passes], length)
        assert expected.passes_L[length - 1] == len(passes)
        assert expected.drafted_LK[length - 1, :length].tolist() == counts["drafted"]
        assert expected.accepted_LK[length - 1, :length].tolist() == counts["accepted"]
        reached = [sum(x.drafted >= k and x.accepted >= k - 1 for x in passes) for k in range(1, length + 1)]
        assert expected.reached_LK[length - 1, :length].tolist() == reached
        for counts_LK in expected[1:]:
            assert not counts_LK[length - 1, length:].any()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("vocabulary", "steps", "length"), [(3, 1, 4), (3, 2, 4), (3, 3, 5), (4, 2, 3), (3, 4, 2)])
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_expected_counts_equal_those_of_every_enumerated_text(
    verification: Verification, vocabulary: int, steps: int, length: int, greedy: bool
) -> None:
    """All drafts, verifications and texts of a small world against the sweep over one text at a time."""
    world = random_world(vocabulary, steps, greedy, seed=3)
    enumerated = [decoded_texts(world, draft_length, verification, length) for draft_length in range(1, steps + 1)]
    texts_BE = world.texts(length)
    states_BE = world.states(texts_BE)[:, :-1]
    possible = world.text_probability(length) > 0
    for text in torch.nonzero(possible)[:, 0].tolist():
        tokens_E, states_E = texts_BE[text], states_BE[text]
        q_KE = world.q_KSV[:, states_E, tokens_E].numpy()
        q_KN = np.full((steps, length), np.nan)  # past the end: anything
        for k in range(min(steps, length)):
            q_KN[k, : length - k] = q_KE[k, k:]
        accept_KN = acceptance_probability(world.p_SV[states_E, tokens_E].numpy(), q_KN, verification)
        expected = expected_passes(accept_KN)
        for row, (chance, counts) in enumerate(enumerated):
            found = [expected.passes_L[row], *expected.accepted_LK[row, : row + 1]]
            np.testing.assert_allclose(found, counts[text] / chance[text], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_passes_obey_the_recursion_over_anchors(steps: int) -> None:
    """V(n) = 1 + sum_a c_a V(n + a + 1), written out for one draft length."""
    num_tokens = 21
    accept_KN = np.random.default_rng(0).random((steps, num_tokens))
    value = [0.0] * (num_tokens + 1)
    for anchor in reversed(range(num_tokens)):
        room = num_tokens - anchor
        reach, value[anchor] = 1.0, 1.0
        for accepted in range(min(steps, room)):
            going_on = reach * accept_KN[accepted, anchor]
            value[anchor] += (reach - going_on) * value[anchor + accepted + 1]
            reach = going_on
        value[anchor] += reach * value[min(anchor + steps + 1, num_tokens)]
    assert expected_passes(accept_KN).passes_L[-1] == pytest.approx(value[0], rel=1e-12)


def test_emitted_tokens_are_accepted_drafts_and_one_a_pass() -> None:
    """But for a last pass that ends with a draft: a text long enough makes it not matter."""
    accept_KN = np.full((4, 5000), 0.6)
    expected = expected_passes(accept_KN)
    lengths = 5000 / expected.passes_L
    np.testing.assert_allclose(lengths, [sum(0.6**k for k in range(n + 1)) for n in range(1, 5)], rtol=1e-3)
    np.testing.assert_allclose(expected.accepted_LK.sum(1) + expected.passes_L, 5000, rtol=1e-3)
    np.testing.assert_allclose(expected.accepted_LK[3] / expected.reached_LK[3], 0.6)


def test_values_past_the_end_of_the_text_are_ignored() -> None:
    accept_KN = np.random.default_rng(1).random((5, 9))
    poisoned_KN = np.where(np.arange(1, 6)[:, None] + np.arange(9) <= 9, accept_KN, np.nan)
    for clean, poisoned in zip(expected_passes(accept_KN), expected_passes(poisoned_KN), strict=True):
        np.testing.assert_array_equal(clean, poisoned)


def test_block_verification_needs_no_more_passes() -> None:
    rng = np.random.default_rng(2)
    p_N, q_KN = rng.random(63) + 0.01, rng.random((6, 63))
    token, block = (expected_passes(acceptance_probability(p_N, q_KN, way)).passes_L for way in VERIFICATIONS)
    assert block[0] == pytest.approx(token[0], rel=1e-12)
    assert (block[1:] < token[1:]).all()


def test_products_of_huge_ratios_do_not_overflow() -> None:
    p_N, q_KN = np.full(8, 1e-300), np.ones((8, 8))
    q_KN[7, 0] = 0
    accept_KN = acceptance_probability(p_N, q_KN, Verification.block)
    assert accept_KN[:7, 0].tolist() == [1] * 7
    assert accept_KN[7, 0] == 0


@pytest.mark.parametrize(("p_N", "message"), [([0.5, 0.5], "one probability a token"), ([0.5, 0.0, 0.5], "above 0")])
def test_a_text_that_does_not_fit_is_refused(p_N: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acceptance_probability(np.array(p_N), np.ones((2, 3)))
