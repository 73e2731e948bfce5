"""Weights & Biases: one run for all processes of a job, offline if there is no API key."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from mtptrain.run.storage import write_json
from mtptrain.run.trackers import TrackedRun, unlogged
from mtptrain.run.typed_json import from_json, to_json

PACKAGES = ("wandb",)
RUN_FILE = "wandb_run.json"  # W&B's id of the run, so that a resumed run continues it, and the rows that it has


@dataclass(frozen=True, slots=True)
class _Record:
    """Content of `RUN_FILE`: W&B's id of the run, and the last step that was sent, by metric."""

    id: str
    sent_steps: dict[str, int] = field(default_factory=dict)


class WandbTracker:
    """A W&B run.

    Args:
        run: as `wandb.init` returns it.
        folder: the run's folder, where `RUN_FILE` is written for a resumed run.
        sent_steps: the last step of each metric that W&B has from earlier processes.
        is_offline: whether the user has to upload the run.
    """

    def __init__(self, run: Any, folder: Path, sent_steps: dict[str, int], is_offline: bool) -> None:
        self.run, self.folder, self.sent_steps, self.is_offline = run, folder, sent_steps, is_offline

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, except those that W&B already has: offline it only appends."""
        fresh = unlogged(step, metrics, self.sent_steps)
        if fresh:
            self.run.log(fresh, step=step)
            self.sent_steps |= dict.fromkeys(fresh, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        import wandb

        self.run.log({name: wandb.Table(columns=[*columns], data=[list(row) for row in rows])})

    def artifact(self, name: str, kind: str, files: Sequence[Path], texts: Mapping[str, str]) -> None:
        """Store files, folders and texts as one artifact of this run."""
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.run.id}", type=kind)
        for path in files:
            for file in filter(Path.is_file, [path, *path.rglob("*")]):
                artifact.add_file(str(file), name=str(file.relative_to(path.parent)))
        for file_name, text in texts.items():
            with artifact.new_file(file_name, mode="w") as opened:
                opened.write(text)
        self.run.log_artifact(artifact)

    def finish(self, failed: bool) -> None:
        """End the run and print the command that uploads an offline one."""
        try:
            self.run.finish(exit_code=int(failed))
            write_json(self.folder / RUN_FILE, to_json(_Record(self.run.id, self.sent_steps)))
        finally:
            if self.is_offline:  # each restart adds a folder
                folders = self.folder / "wandb" / f"offline-run-*-{self.run.id}"
                print(f"W&B ran offline; upload it with: wandb sync {folders}", file=sys.stderr)


def begin(run: TrackedRun) -> WandbTracker:
    """Start a W&B run, or continue the one whose id is in the run's folder."""
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY"))
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    path = run.folder / RUN_FILE
    stored = _Record(uuid4().hex[:8])
    if path.exists():
        stored = from_json(_Record, json.loads(path.read_text(encoding="utf-8")))
    # Without `sent_steps` until the end: a killed process loses an unknown number of W&B's last rows.
    write_json(path, {"id": stored.id})
    begun = wandb.init(
        project=run.config.project,
        name=run.config.name,
        group=run.group,
        tags=run.config.tags,
        id=stored.id,
        resume=None if mode == "offline" else "allow",
        dir=str(run.folder),
        mode=mode,
        config=run.settings,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbTracker(begun, run.folder, stored.sent_steps, mode == "offline")
