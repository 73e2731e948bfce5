"""The certificate of an evaluation: the output is the backbone's own, and replay counts what the loop does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtptrain.decoding.records import Decoded, VerifyPass

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


def certify_greedy(runs: list[LoopRun], dtype: str) -> dict[str, Any]:
    """Compare every real greedy run with plain decoding and with replay.

    A text may part from plain decoding only where the backbone's two largest logits tie numerically, and the tie is
    reported.

    Args:
        runs: the real runs.
        dtype: of the backbone, `float32` or `bfloat16`.

    Returns:
        `greedy_identity` and `replay_equals_loop` of evaluation.json's certificate.
    """
    near_ties: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    disagreements: list[dict[str, Any]] = []
    for run in runs:
        where = {"head": run.head, "prompt": run.prompt, "draft_length": run.draft_length}
        parting = first_difference(run)
        if parting is not None:
            position, gap = parting
            row = {**where, "position": position, "gap": gap}
            (near_ties if gap < TIE_GAP[dtype] else differences).append(row)
        if run.replayed is not None and run.replayed != run.loop.passes:
            counts = {"loop_passes": len(run.loop.passes), "replay_passes": len(run.replayed)}
            disagreements.append({**where, **counts})
    known = sum(run.replayed is not None for run in runs)
    return {
        "greedy_identity": {
            "passed": not differences,
            "compared": len(runs),
            "identical": len(runs) - len(near_ties) - len(differences),
            "near_ties": near_ties,
            "differences": differences,
        },
        "replay_equals_loop": {
            "passed": not disagreements,
            "compared": known,
            "equal": known - len(disagreements),
            "differences": disagreements,
        },
    }
