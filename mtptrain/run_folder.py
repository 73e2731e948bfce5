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

from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.provenance import describe_run
from mtptrain.storage import write_json, write_text
from mtptrain.tracking import METRICS_FILE, MetricsLog


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
        """One line for the person who watches."""
        print(line, file=sys.stderr, flush=True)

    def open_log(self, start_step: int = 0) -> MetricsLog:
        """The run's metrics log; rows after `start_step` are dropped."""
        return MetricsLog(self.config.tracking, self.path, self.settings, start_step)


def default_output_dir(task: str, job_number: int | None) -> Path:
    """A fresh folder for a run without `output_dir`; a sweep's jobs get one each."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path("outputs") / task / (stamp if job_number is None else f"{stamp}_job{job_number}")


def open_run_folder(config: RunConfig, settings: dict[str, Any], job_number: int | None = None) -> RunFolder:
    """Make or reopen a run's folder and write its configuration and provenance.

    Raises:
        UserError: the folder cannot be written, or holds another run and `resume` is `never`.
    """
    path = Path(config.output_dir) if config.output_dir else default_output_dir(config.task.value, job_number)
    if config.output_dir and job_number is not None:
        path = path / f"job{job_number}"
    if config.resume == "never" and ((path / METRICS_FILE).exists() or (path / "checkpoints").exists()):
        raise UserError(
            f"output_dir={path}: already holds a run; choose another folder, or continue it with resume=auto"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={path}: cannot be made ({error.strerror}); choose another folder") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"output_dir={path}: cannot be written; choose another folder or change its rights")
    provenance = describe_run(config.seed)
    earlier = path / "provenance.json"
    if earlier.exists():
        provenance["continues"] = json.loads(earlier.read_text(encoding="utf-8"))
    write_text(path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_json(path / "provenance.json", provenance)
    return RunFolder(path, config, settings, provenance)
