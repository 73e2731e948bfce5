"""The folder of a run: its configuration, provenance and metrics."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtptrain.config import RunConfig, Tracker, TrackingConfig
from mtptrain.errors import UserError
from mtptrain.provenance import describe_run, hardware
from mtptrain.storage import write_json, write_text
from mtptrain.tracking import METRICS_FILE, MetricsLog
from mtptrain.wandb_mirror import WandbMirror


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: the folder.
        config: the run's configuration.
        settings: the same as plain values, as written to config.yaml.
        provenance: as written to provenance.json.
    """

    path: Path
    config: RunConfig
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def say(self, line: str) -> None:
        """One line for the person who watches, from rank 0."""
        if is_first():
            print(line, file=sys.stderr, flush=True)

    def require_empty(self) -> Path:
        """The folder, for a program that writes it as a whole; raises a `UserError` where anything lies in it."""
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"output_dir={self.path}: is not empty; choose another folder, nothing is overwritten")
        return self.path

    def record(self) -> None:
        """Let rank 0 write config.yaml and provenance.json, once everything the run needs has been found sound.

        Raises:
            UserError: the folder cannot be made.
        """
        from mtptrain.distributed import on_first  # loads torch, which a plan does without

        on_first(self.write)

    def write(self) -> None:
        """What `record` lets rank 0 do."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={self.path}: cannot be made ({error.strerror}); choose another one") from None
        self.provenance["hardware"] = hardware()  # the number of threads is settled only now
        write_text(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        write_json(self.path / "provenance.json", self.provenance)

    @property
    def tracking(self) -> TrackingConfig:
        """Where this process sends metrics: rank 0 alone does."""
        return self.config.tracking if is_first() else TrackingConfig(tracker=Tracker.none)

    def open_mirror(self) -> WandbMirror:
        """What mirrors the run; nothing is sent or written yet. Whoever opens it finishes it."""
        return WandbMirror(self.tracking, self.path, self.settings)

    def open_log(self, mirror: WandbMirror, start_step: int = 0) -> MetricsLog:
        """The run's metrics log; rows after `start_step` are dropped. Records the run."""
        self.record()
        return MetricsLog(self.tracking, self.path, mirror, start_step)


def is_first() -> bool:
    """Whether this process is the one that speaks and writes, by the launcher's variable; the only one always is."""
    return os.environ.get("RANK", "0") == "0"


def default_output_dir(task: str, job_number: int | None) -> Path:
    """A fresh folder for a run without `output_dir`; a sweep's jobs get one each."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path("outputs") / task / (stamp if job_number is None else f"{stamp}_job{job_number}")


def holds_run(path: Path) -> bool:
    """Whether a folder holds what a run has trained or logged."""
    metrics = path / METRICS_FILE
    return (path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def check_writable(path: Path) -> None:
    """Raise a `UserError` unless a folder can be made and written at `path`; nothing is made yet."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"output_dir={path}: {nearest} is not a folder; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir={path}: {nearest} cannot be written; choose another folder or change its rights")


def open_run_folder(config: RunConfig, settings: dict[str, Any], job_number: int | None = None) -> RunFolder:
    """The folder of a run, checked but not written to: `RunFolder.record` and the log make it.

    Raises:
        UserError: the folder cannot be written, or holds another run and `resume` is `never`.
    """
    path = Path(config.output_dir) if config.output_dir else default_output_dir(config.task, job_number)
    if config.output_dir and job_number is not None:
        path = path / f"job{job_number}"
    provenance = describe_run(config.seed)
    try:
        check_writable(path)
        if config.resume == "never" and holds_run(path):
            raise UserError(
                f"output_dir={path}: already holds a run; choose another folder, or continue it with resume=auto"
            )
        earlier = path / "provenance.json"
        if config.resume == "auto" and earlier.exists():
            provenance["continues"] = json.loads(earlier.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"output_dir={path}: cannot be used ({error.strerror}); choose another folder") from None
    return RunFolder(path, config, settings, provenance)
