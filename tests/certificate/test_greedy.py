"""Greedy loops may part from plain decoding at ties that the rounding noise of the run explains, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from mtptrain.certificate.greedy import DraftNoise, LoopRun, certify_greedy, poisson_bound, tie_bound
from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import (
    NoiseLevel,
    PassDifference,
    ReplayEqualsLoop,
    SizeLevel,
    TextDifference,
)

NOISE = NoiseLevel(SizeLevel(1e-5, 4e-5, 0), SizeLevel(3e-5, 1.2e-4, 0), extreme=1e-4)
PASSES = [VerifyPass(3, 1, 2)]


def run(
    plain: list[int], loop: list[int], gap: float = 1.0, replayed: list[VerifyPass] | None = None, prompt: int = 0
) -> LoopRun:
    rows = [Decoded(tokens, [gap] * len(tokens), passes=PASSES) for tokens in (plain, loop)]
    return LoopRun("h", prompt, 2, 1, *rows, replayed)


def test_a_certificate_needs_identity_and_equal_counts() -> None:
    def passed(one: LoopRun) -> tuple[bool, bool]:
        identity, replay = certify_greedy([one], NOISE, {})
        return identity.passed, replay.passed

    assert passed(run([1, 2], [1, 2], replayed=PASSES)) == (True, True)
    assert passed(run([1, 2], [1, 3], replayed=PASSES)) == (False, True)
    assert passed(run([1, 2], [1, 2], replayed=[VerifyPass(3, 0, 1)] * 2)) == (True, False)


def test_a_loop_without_a_replay_is_not_counted_as_compared() -> None:
    _, replay = certify_greedy([run([1, 2], [1, 2])], NOISE, {})
    assert replay == ReplayEqualsLoop(passed=True, compared=0, equal=0, differences=[])


def test_a_numerical_tie_is_reported_and_does_not_fail() -> None:
    identity, _ = certify_greedy([run([1, 2], [1, 3], 1e-5)], NOISE, {})
    assert identity.passed
    assert identity.identical == 0
    assert identity.near_ties == [TextDifference(head="h", prompt=0, draft_length=2, position=1, gap=1e-5)]


@pytest.mark.parametrize(("plain", "loop"), [([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2])])
def test_a_text_that_goes_on_where_the_other_ends_is_a_difference(plain: list[int], loop: list[int]) -> None:
    """Even where every gap would be a tie."""
    identity, _ = certify_greedy([run(plain, loop, gap=0.0)], NOISE, {})
    assert not identity.passed
    assert identity.differences == [TextDifference(head="h", prompt=0, draft_length=2, position=2, gap=None)]
    assert identity.near_ties == []


def many_ties(prompts: int, runs: int) -> list[LoopRun]:
    """Texts of 40 tokens with gaps of 1, of which every one parts at a last token of gap 0."""
    loops = []
    for prompt in range(prompts):
        plain = Decoded([7] * 40, [1.0] * 39 + [0.0], passes=PASSES)
        loop = Decoded([7] * 39 + [8], [1.0] * 40, passes=PASSES)
        loops += [LoopRun("h", prompt, k, 1, plain, loop, None) for k in range(1, runs + 1)]
    return loops


def test_more_ties_than_the_noise_explains_fail() -> None:
    """Loop and plain decoding differ nowhere, so an exact tie cannot part."""
    identity, _ = certify_greedy(many_ties(20, 1), NOISE, {})
    assert identity.differences == []
    assert identity.tie_budget < 20
    assert not identity.passed


def test_the_same_tie_of_a_prompt_counts_once() -> None:
    identity, _ = certify_greedy(many_ties(1, 20), NOISE, {})
    assert len(identity.near_ties) == 20
    assert identity.passed


@pytest.mark.parametrize(("largest", "bound"), [(0.0, 2e-5), (3e-5, 6e-5), (1.3, 1e-4)])
def test_the_bound_of_a_tie_follows_the_differences_of_the_run_within_its_noise(largest: float, bound: float) -> None:
    assert tie_bound(np.array([largest]), NOISE) == pytest.approx(bound)


STEPS = 2
DRAFTS = {"h": DraftNoise(NOISE, np.array([1e-5] * 50 + [4e-5]))}  # a tie lies within 8e-5


def parted(
    margin: float, accepted: int = 1, prompt: int = 0, draft_length: int = STEPS, drafted: int = STEPS
) -> LoopRun:
    """A loop of three passes, of which the second keeps `accepted` of its drafts and none in replay."""
    text = Decoded([1] * 10, [1.0] * 10)
    text.passes = [VerifyPass(STEPS, 2, 3), VerifyPass(STEPS, accepted, accepted + 1), VerifyPass(STEPS, 2, 3)]
    at_anchors = [VerifyPass(STEPS, 2, 3)] * 9
    at_anchors[3] = VerifyPass(drafted, 0, 1)
    margin_KN = np.ones((STEPS, 9))
    margin_KN[0, 3] = margin
    replayed = [at_anchors[0], at_anchors[3], at_anchors[4], at_anchors[7]]
    return LoopRun("h", prompt, draft_length, 1, text, text, replayed, at_anchors, margin_KN)


def test_a_draft_may_part_from_replay_at_a_tie_of_the_heads_logits() -> None:
    """In bf16 the loop and the rollout round drafts differently."""
    _, replay = certify_greedy([parted(5e-5)], NOISE, DRAFTS)
    assert replay.passed
    assert (replay.compared, replay.equal, replay.ties) == (1, 0, 1)
    assert replay.near_ties == [PassDifference("h", 0, STEPS, loop_passes=3, replay_passes=4)]
    assert replay.tie_bounds == {"h": pytest.approx(8e-5)}


@pytest.mark.parametrize(
    ("one", "drafts"),
    [
        (parted(1e-3), DRAFTS),
        (parted(1e-3, accepted=2), DRAFTS),
        (parted(5e-5, drafted=1), DRAFTS),
        (parted(5e-5), {}),
        (replace(parted(5e-5), margin_KN=None), DRAFTS),
    ],
)
def test_any_other_parting_is_a_difference(one: LoopRun, drafts: dict[str, DraftNoise]) -> None:
    """Far from a tie, another number of drafted tokens, an unknown noise, unknown margins."""
    _, replay = certify_greedy([one], NOISE, drafts)
    assert not replay.passed
    assert (len(replay.differences), replay.near_ties, replay.ties) == (1, [], 0)


def test_more_ties_of_drafts_than_their_rounding_explains_fail() -> None:
    """Loop and rollout differ by 1e-5 almost always, and by 4e-5 once in 51."""
    _, replay = certify_greedy([parted(3e-5, prompt=prompt) for prompt in range(30)], NOISE, DRAFTS)
    assert replay.differences == []
    assert replay.ties == 30 > replay.tie_budget
    assert not replay.passed


def test_the_same_tie_of_a_draft_counts_once() -> None:
    _, replay = certify_greedy([parted(3e-5, draft_length=k) for k in range(2, 32)], NOISE, DRAFTS)
    assert (len(replay.near_ties), replay.ties) == (30, 1)
    assert replay.passed


@pytest.mark.parametrize(("mean", "bound"), [(0.0, 0), (1e-6, 0), (1.0, 8), (100.0, 145), (2000.0, 2194)])
def test_the_budget_of_ties_ends_at_any_mean(mean: float, bound: int) -> None:
    """The counts that a Poisson variable exceeds with a chance of 1e-5, summed in decimal arithmetic of 60 digits."""
    assert poisson_bound(mean, 1e-5) == bound
