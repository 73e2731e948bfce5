"""How a trained head leaves for a server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtptrain.config.choices import ExportForm, ExportScheme, ShardCopies
from mtptrain.config.rules import require


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The folder that `recipe=export` writes."""

    form: ExportForm = ExportForm.full
    scheme: ExportScheme = ExportScheme.target
    shards: ShardCopies = ShardCopies.hardlink  # of files that stay as they are
    max_drop: float = 0.05  # acceptance length, tokens a pass, that storing the head may cost; more is an error

    def __post_init__(self) -> None:
        drop = self.max_drop
        require(math.isfinite(drop) and drop >= 0, "export.max_drop", drop, "must be 0 or more tokens a pass")
