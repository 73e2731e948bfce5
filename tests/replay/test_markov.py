import numpy as np
import pytest
import torch

from mtptrain.kernels.acceptance import Verification
from mtptrain.replay.markov import acceptance_probability, expected_passes, inside_text, pass_moments
from tests.kernels.enumerable import NUM_STATES, World, decoded_texts, pass_outcomes, random_world

# K draft steps, N tokens that passes emit.
VERIFICATIONS = list(Verification)


def with_stops(world: World, stopped: bool) -> World:
    """Return the same world, in which drafts end before about every fourth history."""
    if not stopped:
        return world
    generator = torch.Generator().manual_seed(5)
    return world._replace(stops_KS=torch.rand(world.steps, NUM_STATES, generator=generator) < 0.25)


def text_drafted(world: World, states_E: torch.Tensor) -> np.ndarray:
    """Return whether step k is drafted at anchor n after the text's own tokens, regardless of earlier steps."""
    length = len(states_E)
    drafted_KN = np.ones((world.steps, length), dtype=bool)
    if world.stops_KS is not None:
        for k in range(min(world.steps, length)):
            drafted_KN[k, : length - k] = ~world.stops_KS[k, states_E[k:]].numpy()
    return drafted_KN


@pytest.mark.parametrize(("greedy", "stopped"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("vocabulary", "steps", "length"), [(3, 1, 4), (3, 2, 4), (3, 3, 5), (4, 2, 3), (3, 4, 2)])
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_expected_counts_equal_those_of_every_enumerated_text(
    verification: Verification, vocabulary: int, steps: int, length: int, greedy: bool, stopped: bool
) -> None:
    """Enumerate all drafts, verifications and texts of a small world, and compare with the sweep over each text."""
    world = with_stops(random_world(vocabulary, steps, greedy, seed=3), stopped)
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
        expected = expected_passes(accept_KN, text_drafted(world, states_E))
        for row, (chance, counts) in enumerate(enumerated):
            swept = [expected.passes_L[row], *expected.accepted_LK[row, : row + 1]]
            np.testing.assert_allclose(swept, counts[text] / chance[text], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_passes_obey_the_recursion_over_anchors(steps: int) -> None:
    """Write V(n) = 1 + sum_a c_a V(n + a + 1) out for one draft length."""
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


def number_of_passes(reach_KN: np.ndarray, length: int, anchor: int) -> dict[int, float]:
    """Return the distribution of the number of passes from an anchor on, by following every course."""
    num_tokens = reach_KN.shape[1]
    if anchor >= num_tokens:
        return {0: 1.0}
    chance_of: dict[int, float] = {}
    reach = [1.0, *reach_KN[:length, anchor], 0.0]
    for accepted in range(length + 1):
        chance = reach[accepted] - reach[accepted + 1]
        if chance > 0:
            for count, later in number_of_passes(reach_KN, length, anchor + accepted + 1).items():
                chance_of[count + 1] = chance_of.get(count + 1, 0.0) + chance * later
    return chance_of


@pytest.mark.parametrize(("steps", "num_tokens"), [(1, 1), (1, 7), (3, 9), (4, 3), (2, 0)])
def test_mean_and_variance_of_the_passes_are_those_of_every_course(steps: int, num_tokens: int) -> None:
    reach_KN = expected_passes(np.random.default_rng(3).random((steps, num_tokens))).reach_KN
    mean_L, variance_L = pass_moments(reach_KN)
    for length in range(1, steps + 1):
        distribution = number_of_passes(reach_KN, length, 0)
        mean = sum(count * chance for count, chance in distribution.items())
        assert mean_L[length - 1] == pytest.approx(mean, rel=1e-12)
        variance = sum((count - mean) ** 2 * chance for count, chance in distribution.items())
        assert variance_L[length - 1] == pytest.approx(variance, rel=1e-9, abs=1e-12)


def test_visits_are_the_chances_that_passes_begin() -> None:
    """Follow every course and add its chance to its anchors."""
    steps, num_tokens = 3, 7
    expected = expected_passes(np.random.default_rng(4).random((steps, num_tokens)))
    visit_N = np.zeros(num_tokens)

    def follow(anchor: int, chance: float) -> None:
        if anchor < num_tokens:
            visit_N[anchor] += chance
            reach = [1.0, *expected.reach_KN[:, anchor], 0.0]
            for accepted in range(steps + 1):
                follow(anchor + accepted + 1, chance * (reach[accepted] - reach[accepted + 1]))

    follow(0, 1.0)
    np.testing.assert_allclose(expected.visit_LN[-1], visit_N, rtol=1e-12)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_drafted_tokens_past_a_rejection_are_counted_by_visits_and_free_drafts(verification: Verification) -> None:
    """Compare the chance of a visit times the chance of a long enough draft, over all texts, with all passes."""
    vocabulary, steps, length = 3, 3, 4
    world = with_stops(random_world(vocabulary, steps, seed=7), stopped=True)
    assert world.stops_KS is not None
    stops_KS = world.stops_KS

    def long_enough(state: int, k: int, step: int = 0) -> float:
        """Return the chance that a draft from a history has its token k (0-based)."""
        if stops_KS[step, state]:
            return 0.0
        if step == k:
            return 1.0
        q_V = world.q_KSV[step, state].tolist()
        after = [(state * vocabulary + token + 1) % NUM_STATES for token in range(vocabulary)]
        return sum(q * long_enough(later, k, step + 1) for q, later in zip(q_V, after, strict=True))

    def loop(state: int, room: int) -> np.ndarray:
        """Return the drafted tokens at each position over all passes from a history on."""
        if room <= 0:
            return np.zeros(steps)
        total = np.array([long_enough(state, k) if k < room else 0.0 for k in range(steps)])
        for accepted, joint in enumerate(pass_outcomes(world, state, steps, verification)):
            for node, chance in enumerate(joint.reshape(-1)):
                after = state
                for digit in reversed(range(accepted + 1)):
                    after = (after * vocabulary + node // vocabulary**digit % vocabulary + 1) % NUM_STATES
                if chance > 0:
                    total += chance * loop(after, room - accepted - 1)
        return total

    drafted_K = np.zeros(steps)
    texts_BE, chance_B = world.texts(length), world.text_probability(length)
    for tokens_E, states_E, chance in zip(texts_BE, world.states(texts_BE)[:, :-1], chance_B.tolist(), strict=True):
        if chance > 0:
            q_KN = np.zeros((steps, length))
            for k in range(steps):
                q_KN[k, : length - k] = world.q_KSV[k, states_E[k:], tokens_E[k:]].numpy()
            accept_KN = acceptance_probability(world.p_SV[states_E, tokens_E].numpy(), q_KN, verification)
            free_KN = np.array([[long_enough(int(state), k) for state in states_E] for k in range(steps)])
            expected = expected_passes(accept_KN, text_drafted(world, states_E))
            drafted_K += chance * expected.at_positions(free_KN * inside_text(steps, length))[-1]
    np.testing.assert_allclose(drafted_K, loop(0, length), rtol=1e-9)


def test_emitted_tokens_are_accepted_drafts_and_one_a_pass() -> None:
    """Except in a last pass that ends with a draft, which is negligible in a long text."""
    accept_KN = np.full((4, 5000), 0.6)
    expected = expected_passes(accept_KN)
    lengths = 5000 / expected.passes_L
    np.testing.assert_allclose(lengths, [sum(0.6**k for k in range(n + 1)) for n in range(1, 5)], rtol=1e-3)
    np.testing.assert_allclose(expected.accepted_LK.sum(1) + expected.passes_L, 5000, rtol=1e-3)
    np.testing.assert_allclose(expected.accepted_LK[3] / expected.reached_LK[3], 0.6)


def test_values_past_the_end_of_the_text_are_ignored() -> None:
    accept_KN = np.random.default_rng(1).random((5, 9))
    poisoned_KN = np.where(np.arange(1, 6)[:, None] + np.arange(9) <= 9, accept_KN, np.nan)
    clean, poisoned = expected_passes(accept_KN), expected_passes(poisoned_KN)
    for values, same in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(values, same)


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
