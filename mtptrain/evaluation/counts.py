"""What the verify passes of a prompt came to. Every acceptance figure is computed from these counts alone."""

# K draft length

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtptrain.decoding.records import VerifyPass


@dataclass(frozen=True, slots=True)
class Counts:
    """Passes of one prompt at one draft length: whole numbers from a loop, expected ones from replay.

    Attributes:
        passes: verify passes; 0 where the prefill's token was the whole text.
        emitted: tokens that the passes emitted: all of the text but its first.
        drafted_K: float64, drafts that had a token at position k before the text ended; None where replay cannot
            tell (a confidence threshold on stacked modules, see `replay`).
        reached_K: float64, of these, drafts whose first k - 1 tokens were kept.
        accepted_K: float64, and whose token k was kept, too.
    """

    passes: float
    emitted: float
    drafted_K: np.ndarray | None
    reached_K: np.ndarray
    accepted_K: np.ndarray


def count_passes(passes: list[VerifyPass], draft_length: int) -> Counts:
    """Counts of passes that were really made.

    Args:
        passes: of one prompt.
        draft_length: K.
    """
    drafted_P1 = np.array([record.drafted for record in passes], dtype=np.int64).reshape(-1, 1)
    accepted_P1 = np.array([record.accepted for record in passes], dtype=np.int64).reshape(-1, 1)
    position_K = np.arange(1, draft_length + 1)
    has_PK = drafted_P1 >= position_K
    return Counts(
        passes=float(len(passes)),
        emitted=float(sum(record.emitted for record in passes)),
        drafted_K=has_PK.sum(0).astype(np.float64),
        reached_K=(has_PK & (accepted_P1 >= position_K - 1)).sum(0).astype(np.float64),
        accepted_K=(accepted_P1 >= position_K).sum(0).astype(np.float64),
    )
