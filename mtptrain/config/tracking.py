"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtptrain.config.choices import Tracker


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Metrics and where they go; everything but `tracker` is W&B's."""

    tracker: Tracker = Tracker.jsonl
    project: str = "mtptrain"
    name: str | None = None  # of the run; null = chosen by W&B
    group: str | None = None  # runs shown together; null = the name of output_dir's parent, which jobs of a sweep share
    tags: list[str] = field(default_factory=list)
    checkpoints: bool = False  # store the newest and the best checkpoint as artifacts when training ends
