"""What a micro-batch contributes to an optimiser step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss and metrics of one micro-batch.

    Attributes:
        loss: scalar, already divided by the counts of the whole step, so that micro-batches add up.
        sums_K: float64 [K] per name: sums over valid tokens of each draft step; divided by the counts only when logged.
    """

    loss: Tensor
    sums_K: dict[str, Tensor]
