"""Weights & Biases: one run for all processes of a job, offline without a key."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from mtptrain.run.trackers import TrackedRun, unlogged
from mtptrain.storage import write_json

PACKAGES = ("wandb",)
RUN_FILE = "wandb_run.json"  # the id under which a continued run is the same run in W&B


class WandbTracker:
    """A W&B run.

    Args:
        run: as `wandb.init` returns it.
        logged_steps: of each metric, the last step that was sent before the run was interrupted; not sent again.
        offline_folders: pattern of the folders to upload; None for a run that is online.
    """

    def __init__(self, run: Any, logged_steps: Mapping[str, int], offline_folders: Path | None) -> None:
        self.run, self.logged_steps, self.offline_folders = run, logged_steps, offline_folders

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        fresh = unlogged(step, metrics, self.logged_steps)
        if fresh:
            self.run.log(fresh, step=step)

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
        finally:
            if self.offline_folders is not None:  # every restart adds a folder
                print(f"W&B ran offline; upload it with: wandb sync {self.offline_folders}", file=sys.stderr)


def begin(run: TrackedRun) -> WandbTracker:
    """Start a W&B run, or continue the one whose id the run's folder holds."""
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY"))
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    is_offline, is_continued = mode == "offline", (run.folder / RUN_FILE).exists()
    begun = wandb.init(
        project=run.config.project,
        name=run.config.name,
        group=run.group,
        tags=run.config.tags,
        id=_run_id(run.folder),
        resume=None if is_offline else "allow",
        dir=str(run.folder),
        mode=mode,
        config=run.settings,
        settings=wandb.Settings(silent=True, console="off"),
    )
    offline_folders = run.folder / "wandb" / f"offline-run-*-{begun.id}" if is_offline else None
    return WandbTracker(begun, run.logged_steps if is_continued else {}, offline_folders)


def _run_id(folder: Path) -> str:
    """Return the id of this run, the same after a restart."""
    path = folder / RUN_FILE
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    run_id = uuid4().hex[:8]
    write_json(path, {"id": run_id})
    return run_id
