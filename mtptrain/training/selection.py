"""The choice of a checkpoint as the best of its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]  # plain values by name, as JSON holds them
SELECTION = "selection"  # counter in the checkpoint `best`


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of a checkpoint as the best of its run.

    Attributes:
        by: name of the metric.
        prompts: digests of the prompts that it was measured on.
    """

    by: str
    prompts: list[str]

    @classmethod
    def of(cls, counters: Values) -> Selection | None:
        """Return the selection that the counters of a checkpoint hold."""
        stored = counters.get(SELECTION)
        return cls(str(stored["by"]), list(stored["prompts"])) if stored else None
