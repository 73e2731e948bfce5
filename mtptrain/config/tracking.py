"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config.choices import Tracker


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Metrics and where they go."""

    tracker: Tracker = Tracker.jsonl
    project: str = "mtptrain"
    name: str | None = None  # of the W&B run; null = chosen by W&B
