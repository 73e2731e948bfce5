"""The certificate of an evaluation: the output is the backbone's own, and replay counts what the loop does."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.decoding.results import Decoded, VerifyPass
from mtptrain.evaluation.certificate_result import GreedyIdentity, PassDifference, ReplayEqualsLoop, TextDifference

# fp32 logits of one batched verify and of single steps were seen to differ by 1.3e-5; bf16 logits tie exactly.
TIE_GAP = {"float32": 1e-4, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class LoopRun:
    """One speculative decoding that was really run, beside what it must agree with.

    Attributes:
        head: name of the head.
        prompt: number of the prompt.
        draft_length: K.
        plain: the backbone's own decoding of the prompt.
        loop: the speculative decoding.
        replayed: replay's passes on the loop's own text; None where replay cannot tell what is drafted.
    """

    head: str
    prompt: int
    draft_length: int
    plain: Decoded
    loop: Decoded
    replayed: list[VerifyPass] | None


def first_difference(run: LoopRun) -> tuple[int, float] | None:
    """Position and top-2 gap of plain decoding where the two texts part, or None where they are the same."""
    if run.loop.tokens == run.plain.tokens:
        return None
    pairs = zip(run.plain.tokens, run.loop.tokens, strict=False)
    shorter = min(len(run.plain.tokens), len(run.loop.tokens))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return position, run.plain.gaps[position] if position < len(run.plain.gaps) else 0.0


def certify_greedy(runs: list[LoopRun], dtype: str) -> tuple[GreedyIdentity, ReplayEqualsLoop]:
    """Compare every real greedy run with plain decoding and with replay.

    A text may part from plain decoding only where the backbone's two largest logits tie numerically, and the tie is
    reported.

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
