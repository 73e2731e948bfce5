"""Metrics: `metrics.jsonl`, flushed a line at a time, is the record; W&B is a mirror that never stops a run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TextIO

from mtptrain.config import Tracker, TrackingConfig
from mtptrain.storage import write_text
from mtptrain.wandb_mirror import WandbMirror

METRICS_FILE = "metrics.jsonl"


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows that an interrupted run wrote after the checkpoint it continues from."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if row.get("step", 0) <= step:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def _open(path: Path, start_step: int) -> TextIO | None:
    """The log, without rows after `start_step`; None where it cannot be written, which is told."""
    try:
        if path.exists():
            _keep_until(path, start_step)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); training goes on without it", file=sys.stderr)
        return None


class MetricsLog:
    """Writes one row of metrics a call. A disk that fails ends the log, not the training.

    Args:
        config: which trackers.
        output_dir: holds metrics.jsonl.
        mirror: is sent the same rows.
        start_step: rows after this step, left by an interrupted run, are dropped.
    """

    def __init__(self, config: TrackingConfig, output_dir: Path, mirror: WandbMirror, start_step: int = 0) -> None:
        self.file: TextIO | None = None
        self.mirror = mirror
        if config.tracker is not Tracker.none:
            self.file = _open(output_dir / METRICS_FILE, start_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; a figure that is not finite is `null`, for JSON knows no other word for it."""
        if self.file is not None:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            try:
                self.file.write(json.dumps({"step": step, **row}) + "\n")
                self.file.flush()
            except OSError as error:
                print(f"{METRICS_FILE} ends before step {step}: {error.strerror}", file=sys.stderr)
                self.file = None
        self.mirror.log(step, metrics)

    def close(self) -> None:
        """Close the file; the mirror goes on, for what is measured after training."""
        if self.file is not None:
            self.file.close()
