"""The certificate of the texts of greedy loops: they are those of plain decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import (
    GreedyIdentity,
    NoiseLevel,
    TextDifference,
)

LEVEL = 1e-5  # chance of more ties than the budget


@dataclass(frozen=True, slots=True)
class LoopRun:
    """One real run of speculative decoding, with its two references.

    Attributes:
        head: name of the head.
        prompt: number of the prompt; the same prompt has one number in all runs.
        draft_length: K.
        batch: prompts decoded together.
        plain: plain decoding of the prompt by the backbone.
        loop: the speculative decoding.
        at_anchors: replay's pass at every anchor of the loop's own text; None if replay cannot know the drafted tokens.
        margin_KN, free_margin_KN: see `ReplayDrafts`; None if unknown.
        is_walked: a draft depends on the passes before it, so that of `at_anchors` only replay's own passes count.
    """

    head: str
    prompt: int
    draft_length: int
    batch: int
    plain: Decoded
    loop: Decoded
    at_anchors: list[VerifyPass] | None
    margin_KN: np.ndarray | None = None
    free_margin_KN: np.ndarray | None = None
    is_walked: bool = False


def count_agreeing(run: LoopRun) -> int:
    """Return the number of tokens before the two texts part."""
    pairs = zip(run.plain.tokens, run.loop.tokens, strict=False)
    shorter = min(len(run.plain.tokens), len(run.loop.tokens))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def first_difference(run: LoopRun) -> TextDifference | None:
    """Return where the two texts part; None for equal texts."""
    if run.loop.tokens == run.plain.tokens:
        return None
    position = count_agreeing(run)
    goes_on = position < min(len(run.plain.tokens), len(run.loop.tokens))
    gap = run.plain.gaps[position] if goes_on else None
    return TextDifference(run.head, run.prompt, run.draft_length, position, gap)


def certify_texts(runs: list[LoopRun], noise: NoiseLevel) -> GreedyIdentity:
    """Compare the text of every real greedy run with plain decoding.

    A text may part from plain decoding only at a numerical tie of the backbone's two largest logits, and only so often
    as the noise of the logits explains. A text that goes on where the other ends is never a tie.

    Args:
        runs: the real runs.
        noise: of the gaps between the two largest logits.
    """
    differences_N = gap_differences(runs)
    bound = tie_bound(differences_N, noise)
    budget = tie_budget(runs, differences_N)
    partings = [parting for run in runs if (parting := first_difference(run)) is not None]
    near_ties = [one for one in partings if one.gap is not None and one.gap <= bound]
    differences = [one for one in partings if one not in near_ties]
    ties = {(one.prompt, one.position) for one in near_ties}
    return GreedyIdentity(
        passed=not differences and len(ties) <= budget,
        compared=len(runs),
        identical=len(runs) - len(partings),
        tie_bound=bound,
        tie_budget=budget,
        near_ties=near_ties,
        differences=differences,
    )


def gap_differences(runs: list[LoopRun]) -> np.ndarray:
    """Return the absolute differences of the gaps of loop and plain decoding at all tokens on which they agree."""
    parts = []
    for run in runs:
        count = count_agreeing(run)
        parts.append(np.abs(np.array(run.loop.gaps[:count]) - np.array(run.plain.gaps[:count])))
    return np.concatenate(parts) if parts else np.empty(0)


def tie_bound(differences_N: np.ndarray, noise: NoiseLevel) -> float:
    """Return the largest gap of a tie: twice the largest difference between loop and plain decoding.

    It is at least twice the typical noise, of which few tokens may show less, and at most the largest noise.
    """
    largest = float(differences_N.max(initial=0.0))
    return max(2 * noise.typical.median, min(2 * largest, noise.extreme))


def tie_budget(runs: list[LoopRun], differences_N: np.ndarray) -> int:
    """Return the most ties that are likely: positions of plain texts whose gap a difference may exceed.

    Each position counts with the share of all differences that exceed its gap, and one position of a prompt once,
    whatever the number of its runs. More ties have a chance of at most `LEVEL` (Poisson).
    """
    gaps = {run.prompt: np.array(run.plain.gaps) for run in runs}
    return most_ties(sum(expected_ties(gap_N, differences_N) for gap_N in gaps.values()))


def expected_ties(gap_N: np.ndarray, differences_N: np.ndarray) -> float:
    """Return the expected number of gaps that a difference exceeds; a gap counts with the share that exceed it."""
    ordered_N = np.sort(differences_N)
    exceeding_N = len(ordered_N) - np.searchsorted(ordered_N, gap_N, side="right")
    return float(((exceeding_N + 0.5) / (len(ordered_N) + 1)).sum())


def most_ties(expected: float) -> int:
    """Return the smallest number that a Poisson variable of some mean exceeds with a chance of at most `LEVEL`."""
    count, below = -1, 0.0
    while 1 - below > LEVEL:
        count += 1
        # By logarithms, because exp(-expected) is 0 for more than 745.
        below += math.exp(count * math.log(expected) - expected - math.lgamma(count + 1)) if expected else 1.0
    return count
