"""The certificate of greedy loops: their texts equal plain decoding, and their passes equal those of replay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import (
    GreedyIdentity,
    NoiseLevel,
    PassDifference,
    ReplayEqualsLoop,
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
        replayed: replay's passes on the loop's own text; None if replay cannot know the drafted tokens.
        at_anchors: the pass that replay would begin at each anchor of that text; none if it cannot know.
        margin_KN: see `ReplayDrafts`; None if unknown, and no parting is then a tie.
    """

    head: str
    prompt: int
    draft_length: int
    batch: int
    plain: Decoded
    loop: Decoded
    replayed: list[VerifyPass] | None
    at_anchors: list[VerifyPass] = field(default_factory=list)
    margin_KN: np.ndarray | None = None


class DraftNoise(NamedTuple):
    """The rounding of one head's drafts: its measured noise, and how far loop and rollout lie apart on some texts."""

    noise: NoiseLevel
    differences_N: np.ndarray


class Step(NamedTuple):
    """A drafted token of a prompt: the step, from 0, of the draft at an anchor."""

    head: str
    prompt: int
    anchor: int
    step: int


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


def certify_greedy(
    runs: list[LoopRun], noise: NoiseLevel, drafts: Mapping[str, DraftNoise]
) -> tuple[GreedyIdentity, ReplayEqualsLoop]:
    """Compare every real greedy run with plain decoding and with replay.

    A text may part from plain decoding only at a numerical tie of the backbone's two largest logits, and only so often
    as the noise of the logits explains. A text that goes on where the other ends is never a tie. In the same way a
    pass may keep another part of its draft than in replay, where the first token that only one of them keeps is a tie
    of the head's logits: the drafts of the loop and of the rollout are rounded differently.

    Args:
        runs: the real runs.
        noise: of the gaps between the two largest logits.
        drafts: the rounding of drafts, by head.
    """
    return _compare_texts(runs, noise), _compare_passes(runs, drafts)


def _compare_texts(runs: list[LoopRun], noise: NoiseLevel) -> GreedyIdentity:
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
    return poisson_bound(sum(_expected_ties(gap_N, differences_N) for gap_N in gaps.values()), LEVEL)


def _expected_ties(gap_N: np.ndarray, differences_N: np.ndarray) -> float:
    """Return the expected number of gaps that a difference exceeds; a gap counts with the share that exceed it."""
    ordered_N = np.sort(differences_N)
    exceeding_N = len(ordered_N) - np.searchsorted(ordered_N, gap_N, side="right")
    return float(((exceeding_N + 0.5) / (len(ordered_N) + 1)).sum())


def poisson_bound(mean: float, level: float) -> int:
    """Return the smallest count that a Poisson variable exceeds with a chance of at most `level`."""
    count, below = -1, 0.0
    while 1 - below > level:
        count += 1
        # By logarithms, because exp(-mean) is 0 for a mean above 745.
        below += math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) if mean else 1.0
    return count


def _compare_passes(runs: list[LoopRun], drafts: Mapping[str, DraftNoise]) -> ReplayEqualsLoop:
    bounds = {head: tie_bound(one.differences_N, one.noise) for head, one in drafts.items()}
    known = 0
    near_ties: list[PassDifference] = []
    differences: list[PassDifference] = []
    close: dict[Step, float] = {}  # margins within the bound, of all steps that the loops verified
    ties: set[Step] = set()
    for run in runs:
        if run.replayed is None:
            continue
        known += 1
        bound = bounds.get(run.head, 0.0)
        close |= {step: margin for step, margin in _verified_steps(run) if margin <= bound}
        if run.replayed == run.loop.passes:
            continue
        lengths = len(run.loop.passes), len(run.replayed)
        partings = _partings(run)
        is_tie = None not in partings and partings <= close.keys()
        (near_ties if is_tie else differences).append(PassDifference(run.head, run.prompt, run.draft_length, *lengths))
        ties |= {step for step in partings if step is not None and is_tie}
    budget = _tie_budget_of_drafts(close, drafts)
    equal = known - len(differences) - len(near_ties)
    passed = not differences and len(ties) <= budget
    return ReplayEqualsLoop(passed, known, equal, differences, near_ties, len(ties), budget, bounds)


def _verified_steps(run: LoopRun) -> Iterable[tuple[Step, float]]:
    """Yield the steps that loop or replay verified at the loop's anchors, with their margins."""
    anchor = 0
    for record in run.loop.passes:
        last = max(record.accepted, run.at_anchors[anchor].accepted) if run.at_anchors else -1
        for step in range(min(last + 1, record.drafted)):
            if run.margin_KN is not None:
                yield Step(run.head, run.prompt, anchor, step), float(run.margin_KN[step, anchor])
        anchor += record.emitted


def _partings(run: LoopRun) -> set[Step | None]:
    """Return the first token of each draft that only loop or replay keeps; None if they drafted different lengths."""
    partings: set[Step | None] = set()
    anchor = 0
    for record in run.loop.passes:
        replayed = run.at_anchors[anchor] if run.at_anchors else None
        if replayed != record:
            is_kept_otherwise = replayed is not None and replayed.drafted == record.drafted
            first = min(record.accepted, replayed.accepted) if replayed is not None else 0
            partings.add(Step(run.head, run.prompt, anchor, first) if is_kept_otherwise else None)
        anchor += record.emitted
    return partings or {None}


def _tie_budget_of_drafts(close: Mapping[Step, float], drafts: Mapping[str, DraftNoise]) -> int:
    """Return the most ties of drafts that are likely; see `tie_budget`."""
    expected = 0.0
    for head, one in drafts.items():
        margin_N = np.array([margin for step, margin in close.items() if step.head == head])
        expected += _expected_ties(margin_N, one.differences_N)
    return poisson_bound(expected, LEVEL)
