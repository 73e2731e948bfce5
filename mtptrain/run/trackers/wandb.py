"""Weights & Biases: one run for all processes of a job, offline if there is no API key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from mtptrain.config.verbosity import print_status
from mtptrain.run.storage import write_json
from mtptrain.run.trackers import TrackedRun, unlogged
from mtptrain.run.typed_json import from_json, to_json

PACKAGES = ("wandb",)
STEP = "step"  # the training step, as a metric
BESIDE_ROWS = 10**9  # first row of a process beside the run, above all rows of the run itself
SHARED = "shared"  # W&B's mode for several processes in one run
_PRIMARY: dict[str, Any] = {"x_primary": True, "x_label": "training"}
_BESIDE: dict[str, Any] = {"x_primary": False, "x_label": "watch", "x_update_finish_state": False}
ALONE = (
    "the W&B run of {folder} takes rows of its training alone, because that did not begin with WANDB_MODE=shared; "
    "these rows are kept offline"
)
RUN_FILE = "wandb_run.json"  # W&B's id of the run, so that a resumed run continues it, and the rows that it has


@dataclass(frozen=True, slots=True)
class _Record:
    """Content of `RUN_FILE`.

    Attributes:
        id: W&B's, of the run.
        sent_steps: the last step that was sent, by metric.
        row: W&B's last row number.
        shared: whether the run takes rows of several processes.
    """

    id: str
    sent_steps: dict[str, int] = field(default_factory=dict)
    row: int = -1
    shared: bool = False


class WandbTracker:
    """A W&B run.

    W&B ignores rows whose number is not above that of every earlier row, and a resumed run may log steps that its
    interrupted process has passed. Rows are therefore numbered on their own, by the step where that is free, and
    carry the step as a metric, which is the axis of all others.

    Args:
        run: as `wandb.init` returns it.
        folder: of the run's files, where `RUN_FILE` is written for a resumed run.
        sent: the rows that W&B has from earlier processes.
        is_offline: whether the user has to upload the run.
        is_shared: whether W&B numbers the rows, of several processes at once.
    """

    def __init__(self, run: Any, folder: Path, sent: _Record, is_offline: bool, is_shared: bool = False) -> None:
        self.run, self.folder, self.is_offline, self.is_shared = run, folder, is_offline, is_shared
        self.sent_steps, self.row = dict(sent.sent_steps), sent.row
        self.step: int | None = None  # of the last row
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, except those that W&B already has: offline it only appends."""
        fresh = unlogged(step, metrics, self.sent_steps)
        if fresh:
            if step != self.step:
                self.step, self.row = step, max(self.row + 1, step)
            self._send({STEP: step, **fresh})
            self.sent_steps |= dict.fromkeys(fresh, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table, in a row of its own."""
        import wandb

        self.step, self.row = None, self.row + 1
        table = wandb.Table(columns=[*columns], data=[list(row) for row in rows])
        self._send({name: table})

    def _send(self, values: dict[str, Any]) -> None:
        if self.is_shared:
            self.run.log(values)
        else:
            self.run.log(values, step=self.row)

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
            write_json(self.folder / RUN_FILE, to_json(_Record(self.run.id, self.sent_steps, self.row, self.is_shared)))
        finally:
            if self.is_offline:  # each restart adds a folder
                folders = self.folder / "wandb" / f"offline-run-*-{self.run.id}"
                print_status(f"W&B ran offline; upload it with: wandb sync {folders}")


def begin(run: TrackedRun) -> WandbTracker:
    """Start a W&B run, or continue or join the one whose id is in the run's folder."""
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY"))
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    is_shared = mode == SHARED
    if run.beside is not None:
        return _join(run, run.beside, mode)
    path = run.folder / RUN_FILE
    stored = _Record(uuid4().hex[:8])
    if is_continued := path.exists():
        stored = from_json(_Record, json.loads(path.read_text(encoding="utf-8")))
    # Without `sent_steps` until the end: a killed process loses an unknown number of W&B's last rows.
    write_json(path, {"id": stored.id, "shared": is_shared})
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
        settings=wandb.Settings(silent=True, console="off", **(_PRIMARY if is_shared else {})),
    )
    # A killed process has recorded no row; metrics.jsonl, or W&B's server, has its last one.
    last_row = max(stored.row, run.last_step or 0, int(begun.step) - 1) if is_continued else -1
    return WandbTracker(begun, run.folder, replace(stored, row=last_row), mode == "offline", is_shared)


def _join(run: TrackedRun, folder: Path, mode: Any) -> WandbTracker:
    """Write into the W&B run of another process, with files in `folder`.

    Online, W&B counts the rows that one process has sent, unless all of them began in its `shared` mode: rows of a
    second process would replace the first rows of the training (https://github.com/wandb/wandb/issues/12269). So the
    rows stay offline, to be uploaded after those of the training, unless that began with `WANDB_MODE=shared`.

    Source: https://docs.wandb.ai/models/track/log/distributed-training, "Track all processes to a single run".
    """
    import wandb

    path, own = run.folder / RUN_FILE, folder / RUN_FILE
    if not path.exists():  # the run's own process will take this id
        write_json(path, {"id": uuid4().hex[:8], "shared": mode == SHARED})
    of_run = from_json(_Record, json.loads(path.read_text(encoding="utf-8")))
    sent = from_json(_Record, json.loads(own.read_text(encoding="utf-8"))) if own.exists() else None
    if sent is None or sent.id != of_run.id:
        sent = _Record(of_run.id, row=BESIDE_ROWS)
    if mode in ("online", SHARED):
        mode = SHARED if of_run.shared else "offline"
        if not of_run.shared:
            print_status(ALONE.format(folder=run.folder))
    is_shared = mode == SHARED
    begun = wandb.init(
        project=run.config.project,
        group=run.group,
        id=of_run.id,
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", **_BESIDE),
    )
    return WandbTracker(begun, folder, sent, mode == "offline", is_shared)
