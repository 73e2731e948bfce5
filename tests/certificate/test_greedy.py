"""Greedy loops may part from plain decoding at ties that the rounding noise of the run explains, and nowhere else."""

import numpy as np
import pytest

from mtptrain.certificate.greedy import LoopRun, certify_texts, most_ties, tie_bound
from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import NoiseLevel, SizeLevel, TextDifference

NOISE = NoiseLevel(SizeLevel(1e-5, 4e-5, 0), SizeLevel(3e-5, 1.2e-4, 0), extreme=1e-4)
PASSES = [VerifyPass(3, 1, 2)]


def run(plain: list[int], loop: list[int], gap: float = 1.0) -> LoopRun:
    rows = [Decoded(tokens, [gap] * len(tokens), passes=PASSES) for tokens in (plain, loop)]
    return LoopRun("h", 0, 2, 1, *rows, None)


def test_a_certificate_needs_identity() -> None:
    assert certify_texts([run([1, 2], [1, 2])], NOISE).passed
    assert not certify_texts([run([1, 2], [1, 3])], NOISE).passed


def test_a_numerical_tie_is_reported_and_does_not_fail() -> None:
    identity = certify_texts([run([1, 2], [1, 3], 1e-5)], NOISE)
    assert identity.passed
    assert identity.identical == 0
    assert identity.near_ties == [TextDifference(head="h", prompt=0, draft_length=2, position=1, gap=1e-5)]


@pytest.mark.parametrize(("plain", "loop"), [([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2])])
def test_a_text_that_goes_on_where_the_other_ends_is_a_difference(plain: list[int], loop: list[int]) -> None:
    """Even where every gap would be a tie."""
    identity = certify_texts([run(plain, loop, gap=0.0)], NOISE)
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
    identity = certify_texts(many_ties(20, 1), NOISE)
    assert identity.differences == []
    assert identity.tie_budget < 20
    assert not identity.passed


def test_the_same_tie_of_a_prompt_counts_once() -> None:
    identity = certify_texts(many_ties(1, 20), NOISE)
    assert len(identity.near_ties) == 20
    assert identity.passed


@pytest.mark.parametrize(("largest", "bound"), [(0.0, 2e-5), (3e-5, 6e-5), (1.3, 1e-4)])
def test_the_bound_of_a_tie_follows_the_differences_of_the_run_within_its_noise(largest: float, bound: float) -> None:
    assert tie_bound(np.array([largest]), NOISE) == pytest.approx(bound)


@pytest.mark.parametrize(("expected", "most"), [(0.0, 0), (1e-6, 0), (1.0, 8), (100.0, 145), (2000.0, 2194)])
def test_the_budget_of_ties_ends_at_any_number(expected: float, most: int) -> None:
    """The counts that a Poisson variable exceeds with a chance of 1e-5, summed in decimal arithmetic of 60 digits."""
    assert most_ties(expected) == most
