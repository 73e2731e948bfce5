"""Metrics: `metrics.jsonl`, flushed a line at a time, is the record; W&B is a mirror that never stops a run."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from mtptrain.config import Tracker, TrackingConfig
from mtptrain.storage import write_text

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


def _start_wandb(config: TrackingConfig, output_dir: Path, settings: dict[str, Any]) -> Any:
    """A W&B run, offline when no key is set, or None where W&B fails."""
    try:
        import wandb

        offline = not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "online")
        mode: Any = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
        run = wandb.init(
            project=config.project,
            name=config.name,
            dir=str(output_dir),
            mode=mode,
            config=settings,
            settings=wandb.Settings(silent=True),
        )
        if mode == "offline":
            print(f"W&B runs offline; upload later with: wandb sync {run.dir.removesuffix('/files')}", file=sys.stderr)
        return run
    except Exception as error:  # a tracker that fails never stops training
        print(f"W&B is off: {error}", file=sys.stderr)
        return None


class MetricsLog:
    """Writes one row of metrics a call.

    Args:
        config: which trackers.
        output_dir: holds metrics.jsonl and W&B's offline folder.
        settings: the resolved configuration, for W&B.
        start_step: rows after this step, left by an interrupted run, are dropped.
    """

    def __init__(self, config: TrackingConfig, output_dir: Path, settings: dict[str, Any], start_step: int = 0) -> None:
        self.file = None
        self.wandb = None
        if config.tracker is not Tracker.none:
            path = output_dir / METRICS_FILE
            if path.exists():
                _keep_until(path, start_step)
            self.file = path.open("a", encoding="utf-8")
        if config.tracker is Tracker.wandb:
            self.wandb = _start_wandb(config, output_dir, settings)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; a figure that is not finite is `null`, for JSON knows no other word for it."""
        if self.file is not None:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
        if self.wandb is not None:
            try:
                self.wandb.log(metrics, step=step)
            except Exception as error:
                print(f"W&B is off from step {step} on: {error}", file=sys.stderr)
                self.wandb = None

    def close(self) -> None:
        """Flush and close."""
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                print(f"W&B did not finish: {error}", file=sys.stderr)
