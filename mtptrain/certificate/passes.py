"""The certificate of the passes of loops with greedy drafts: they are those of replay on the loop's own text.

Loop and rollout round drafts differently, in bf16 often by more than two logits lie apart. So a pass may differ from
replay at a numerical tie of the head's logits: where the first token that only one of them keeps, or the step at which
only one of them stops, hangs on no more than the measured rounding, and no more often than that rounding explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mtptrain.certificate.greedy import LoopRun, expected_ties, most_ties, tie_bound
from mtptrain.decoding.results import VerifyPass
from mtptrain.evaluation.certificate_result import NoiseLevel, PassDifference, ReplayEqualsLoop
from mtptrain.replay.replay import listed_passes


class DraftNoise(NamedTuple):
    """The rounding of one head's drafts: its measured noise, and how far loop and rollout lie apart on some texts."""

    noise: NoiseLevel
    differences_N: np.ndarray


class Decision(NamedTuple):
    """What one step of a draft decides: whether its token is kept, or whether the head's own draft stops there.

    `text` is a hash of the loop's tokens up to the anchor: loops with the same text share their decisions. `anchor` is
    that of `ReplayDrafts`, and `step` counts from 0.
    """

    head: str
    prompt: int
    text: int
    anchor: int
    step: int
    is_stop: bool


class Parting(NamedTuple):
    """A pass that differs from replay; without a margin, no change of the head's logits explains it."""

    decision: Decision
    margin: float | None


def certify_passes(runs: list[LoopRun], drafts: Mapping[str, DraftNoise]) -> ReplayEqualsLoop:
    """Compare the passes of every real run with replay.

    Args:
        runs: the real runs.
        drafts: the rounding of drafts, by head; without an entry, no difference is a tie.
    """
    known = [run for run in runs if run.at_anchors is not None]
    bounds = {head: tie_bound(one.differences_N, one.noise) for head, one in drafts.items()}
    ties: set[Decision] = set()
    near_ties: list[PassDifference] = []
    differences: list[PassDifference] = []
    for run in known:
        partings = find_partings(run)
        if not partings:
            continue
        bound = bounds.get(run.head, -1.0)
        is_tie = all(margin is not None and margin <= bound for _, margin in partings)
        (near_ties if is_tie else differences).append(_difference(run, partings))
        ties |= {decision for decision, _ in partings if is_tie}
    budget = _tie_budget(known, drafts, bounds)
    return ReplayEqualsLoop(
        passed=not differences and len(ties) <= budget,
        compared=len(known),
        equal=len(known) - len(differences) - len(near_ties),
        differences=differences,
        near_ties=near_ties,
        ties=len(ties),
        tie_budget=budget,
        tie_bounds=bounds,
    )


def find_partings(run: LoopRun) -> list[Parting]:
    """Return every pass of a loop that differs from replay at the same anchor; the first one alone if it is walked."""
    return [_parting(run, anchor, *passes) for anchor, *passes in _compared(run) if passes[0] != passes[1]]


def _compared(run: LoopRun) -> Iterator[tuple[int, VerifyPass | None, VerifyPass | None]]:
    """Yield anchor, pass of the loop and pass of replay, as far as replay knows it; None where one has ended."""
    at_anchors, anchor = run.at_anchors or [], 0
    for looped in run.loop.passes:
        replayed = at_anchors[anchor] if anchor < len(at_anchors) else None
        yield anchor, looped, replayed
        if run.is_walked and looped != replayed:
            return
        anchor += looped.emitted
    if anchor < len(at_anchors):
        yield anchor, None, at_anchors[anchor]


def _parting(run: LoopRun, anchor: int, looped: VerifyPass | None, replayed: VerifyPass | None) -> Parting:
    if looped is None or replayed is None:
        return Parting(_decision(run, anchor, 0, False), None)
    if looped.accepted != replayed.accepted:
        step = min(looped.accepted, replayed.accepted)
        decision = _decision(run, anchor, step, False)
        return Parting(decision, _margin(run, decision))
    last = min(looped.drafted, replayed.drafted)
    stops = [_decision(run, anchor, step, True) for step in range(last + 1)]
    # After another token of its own, a draft also stops at another step.
    known = [(margin, one) for one in stops if (margin := _margin(run, one)) is not None]
    if len(known) < len(stops) or looped.drafted == replayed.drafted:
        return Parting(stops[-1], None)
    margin, decision = min(known)
    return Parting(decision, margin)


def _decision(run: LoopRun, anchor: int, step: int, is_stop: bool) -> Decision:
    return Decision(run.head, run.prompt, hash(tuple(run.loop.tokens[: anchor + 1])), anchor, step, is_stop)


def _margin(run: LoopRun, decision: Decision) -> float | None:
    """Return how far logits must move for another decision; None if unknown, or past the end of draft or text."""
    margin_KN = run.free_margin_KN if decision.is_stop else run.margin_KN
    if margin_KN is None or decision.step >= min(run.draft_length, margin_KN.shape[1] - decision.anchor):
        return None
    return float(margin_KN[decision.step, decision.anchor])


def _difference(run: LoopRun, partings: list[Parting]) -> PassDifference:
    """Return the entry of a run in the result, with the largest margin of its partings."""
    margins = [margin for _, margin in partings if margin is not None]
    margin = max(margins) if len(margins) == len(partings) else None
    passes = len(run.loop.passes), len(listed_passes(run.at_anchors or []))
    return PassDifference(run.head, run.prompt, run.draft_length, *passes, margin)


def _tie_budget(runs: list[LoopRun], drafts: Mapping[str, DraftNoise], bounds: Mapping[str, float]) -> int:
    """Return the most ties that are likely: decisions whose margin a difference may exceed, each counted once."""
    margins = {
        decision: margin
        for run in runs
        for decision in _decisions(run)
        if (margin := _margin(run, decision)) is not None and margin <= bounds.get(run.head, -1.0)
    }
    expected = 0.0
    for head, one in drafts.items():
        margin_N = np.array([margin for decision, margin in margins.items() if decision.head == head])
        expected += expected_ties(margin_N, one.differences_N)
    return most_ties(expected)


def _decisions(run: LoopRun) -> Iterator[Decision]:
    """Yield the decisions that make the passes of loop and replay what they are."""
    for anchor, *passes in _compared(run):
        known = [one for one in passes if one is not None]
        for is_stop, last in (
            (False, max(one.accepted for one in known)),
            (True, max(one.drafted for one in known)),
        ):
            for step in range(last + 1):
                yield _decision(run, anchor, step, is_stop)
