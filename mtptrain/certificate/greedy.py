"""The certificate of greedy loops: their texts equal plain decoding, and their passes equal those of replay."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import GreedyIdentity, PassDifference, ReplayEqualsLoop, TextDifference

# Measured: fp32 logits of one batched verify and of single steps differ by up to 1.3e-5; bf16 logits tie exactly.
TIE_GAP = {"float32": 1e-4, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class LoopRun:
    """One real run of speculative decoding, with its two references.

    Attributes:
        head: name of the head.
        prompt: number of the prompt.
        draft_length: K.
        plain: plain decoding of the prompt by the backbone.
        loop: the speculative decoding.
        replayed: replay's passes on the loop's own text; None if replay cannot know the drafted tokens.
    """

    head: str
    prompt: int
    draft_length: int
    plain: Decoded
    loop: Decoded
    replayed: list[VerifyPass] | None


def first_difference(run: LoopRun) -> tuple[int, float] | None:
    """Return the position where the two texts part and the top-2 gap of plain decoding there; None for equal texts."""
    if run.loop.tokens == run.plain.tokens:
        return None
    pairs = zip(run.plain.tokens, run.loop.tokens, strict=False)
    shorter = min(len(run.plain.tokens), len(run.loop.tokens))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return position, run.plain.gaps[position] if position < len(run.plain.gaps) else 0.0


def certify_greedy(runs: list[LoopRun], dtype: str) -> tuple[GreedyIdentity, ReplayEqualsLoop]:
    """Compare every real greedy run with plain decoding and with replay.

    A text may part from plain decoding only at a numerical tie of the backbone's two largest logits; ties are reported.

    Args:
        runs: the real runs.
        dtype: of the backbone, `float32` or `bfloat16`.
    """
    return _compare_texts(runs, TIE_GAP[dtype]), _compare_passes(runs)


def _compare_texts(runs: list[LoopRun], tie_gap: float) -> GreedyIdentity:
    near_ties: list[TextDifference] = []
    differences: list[TextDifference] = []
    for run in runs:
        parting = first_difference(run)
        if parting is not None:
            position, gap = parting
            row = TextDifference(run.head, run.prompt, run.draft_length, position, gap)
            (near_ties if gap < tie_gap else differences).append(row)
    identical = len(runs) - len(near_ties) - len(differences)
    return GreedyIdentity(not differences, len(runs), identical, near_ties, differences)


def _compare_passes(runs: list[LoopRun]) -> ReplayEqualsLoop:
    known, differences = 0, []
    for run in runs:
        if run.replayed is None:
            continue
        known += 1
        if run.replayed != run.loop.passes:
            lengths = len(run.loop.passes), len(run.replayed)
            differences.append(PassDifference(run.head, run.prompt, run.draft_length, *lengths))
    return ReplayEqualsLoop(not differences, known, known - len(differences), differences)
