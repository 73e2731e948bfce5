"""The folder of a run: its configuration, provenance and metrics."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.run.folder_lock import FolderLock, require_free
from mtptrain.run.provenance import describe_run, hardware
from mtptrain.run.storage import atomic_folder, write_json, write_text
from mtptrain.run.trackers import TrackedRun, check_trackers
from mtptrain.run.tracking import METRICS_FILE, MetricsLog, Trackers


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: the folder.
        config: the run's configuration.
        settings: the same as plain values, as written to config.yaml.
        provenance: as written to provenance.json.
        lock: of the folders that the run writes; the command line releases it at the end.
    """

    path: Path
    config: RunConfig
    settings: dict[str, Any]
    provenance: dict[str, Any]
    lock: FolderLock = field(default_factory=FolderLock)

    def print_status(self, line: str) -> None:
        """One line for the person who watches, from rank 0."""
        if is_rank0():
            print(line, file=sys.stderr, flush=True)

    def take(self) -> None:
        """Keep other runs from writing the folder until this one ends; for rank 0.

        Raises:
            UserError: another run writes it, or it cannot be made.
        """
        try:
            self.lock.take(self.path, "output_dir")
        except OSError as error:
            raise UserError(f"output_dir={self.path}: cannot be made ({error.strerror}); choose another one") from None

    def require_empty(self) -> Path:
        """The folder, for a program that writes it as a whole; raises a `UserError` if it holds anything."""
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"output_dir={self.path}: is not empty; choose another folder, nothing is overwritten")
        return self.path

    @contextmanager
    def write_whole(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the run's folder when the block ends well.

        Raises:
            UserError: the folder is not empty, or another run writes it.
        """
        self.lock.take(self.path, "output_dir", beside=True)
        self.require_empty()
        with atomic_folder(self.path, replaces=False) as temporary:
            yield temporary

    def record(self) -> None:
        """Let rank 0 write config.yaml and provenance.json, once everything the run needs has been found sound.

        Raises:
            UserError: the folder cannot be made.
        """
        from mtptrain.run.distributed import on_rank0  # loads torch, which a plan does without

        on_rank0(self.write)

    def write(self) -> None:
        """What `record` lets rank 0 do."""
        self.take()
        self.provenance["hardware"] = hardware()  # the number of threads is settled only now
        write_text(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        write_json(self.path / "provenance.json", self.provenance)

    def open_trackers(self) -> Trackers:
        """Return the run's trackers, of which ranks other than 0 have none; use them in a `with` statement."""
        return Trackers(TrackedRun(self.config.tracking, self.path, self.settings) if is_rank0() else None)

    def open_log(self, trackers: Trackers, start_step: int = 0) -> MetricsLog:
        """Record the run and return its metrics log, without rows after `start_step`."""
        self.record()
        has_file = self.config.tracking.metrics_file and is_rank0()
        return MetricsLog(self.path if has_file else None, trackers, start_step)


def is_rank0() -> bool:
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
        UserError: the folder cannot be written, or holds another run and `resume` is `never`; a tracker is unknown
            or its package is missing.
    """
    check_trackers(config.tracking)
    path = Path(config.output_dir) if config.output_dir else default_output_dir(config.task, job_number)
    if config.output_dir and job_number is not None:
        path = path / f"job{job_number}"
    provenance = describe_run(config.seed)
    try:
        check_writable(path)
        require_free(path, "output_dir")
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
