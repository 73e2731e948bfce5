"""The folder of a run: its configuration, provenance and metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import yaml

from mtptrain.config import RunConfig
from mtptrain.config.paths import default_output_dir
from mtptrain.config.verbosity import print_status
from mtptrain.errors import UserError
from mtptrain.run.artifact import BEGUN, is_begun
from mtptrain.run.folder_lock import FolderLock, require_free
from mtptrain.run.provenance import Provenance, describe_run, hardware
from mtptrain.run.storage import atomic_folder, write_json, write_text
from mtptrain.run.trackers import TrackedRun, check_trackers
from mtptrain.run.tracking import METRICS_FILE, MetricsLog, Trackers
from mtptrain.run.typed_json import from_json, to_json

PROVENANCE_FILE = "provenance.json"
CURVE_FILE = "curve.json"  # of all checkpoints of a run; an interrupted measurement can go on
RESULTS = ("evaluation.json", "comparison.json", "doctor.json", "plan.json", "report.html", CURVE_FILE)


class FolderUse(Enum):
    """Use of `output_dir` by a recipe.

    `run`: written while the run goes on, and continued with `resume=auto`. `result`: a result, which only
    `overwrite=true` replaces. `whole`: appears when it is complete, and replaces nothing. `own`: the recipe locks and
    checks what it writes. `none`: the recipe writes no file.
    """

    run = "run"
    result = "result"
    whole = "whole"
    own = "own"
    none = "none"


@dataclass(slots=True)
class RunFolder:
    """The folder that a run writes.

    Attributes:
        path: the folder.
        config: the run's configuration.
        settings: the same as plain values, as written to config.yaml.
        provenance: as written to provenance.json.
        use: what the recipe does with the folder.
        on_policy: folder, making and counts of the on-policy texts, added to provenance.json; None for other data.
        lock: on the folders that the run writes; the command line releases it at the end.
    """

    path: Path
    config: RunConfig
    settings: dict[str, object]
    provenance: Provenance
    use: FolderUse = FolderUse.run
    on_policy: dict[str, object] | None = None
    lock: FolderLock = field(default_factory=FolderLock)

    def print_status(self, line: str) -> None:
        """Print a status line on stderr (rank 0 only)."""
        if is_rank0():
            print_status(line)

    def claim(self) -> None:
        """Lock the folder before anything is read or written, and refuse one that holds something else; rank 0 only.

        Raises:
            UserError: another run is writing the folder, it holds another run or a result, or it cannot be created.
        """
        if self.use in (FolderUse.own, FolderUse.none):
            return
        self.take()
        if self.use is FolderUse.whole:
            self._require_empty()
        else:
            self._refuse_occupied()

    def take(self) -> None:
        """Lock the folder until this run ends; call it on rank 0 only.

        Raises:
            UserError: another run is writing the folder, or it cannot be created.
        """
        try:
            self.lock.take(self.path, "output_dir", beside=self.use is FolderUse.whole)
        except OSError as error:
            raise UserError(
                f"output_dir={self.path}: cannot be created ({error.strerror}); choose another one"
            ) from None

    def _require_empty(self) -> None:
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"output_dir={self.path}: is not empty; choose another folder, nothing is overwritten")

    def _refuse_occupied(self) -> None:
        """Refuse a folder with another run, or with a result that `overwrite` does not give up."""
        where, config = f"output_dir={self.path}", self.config
        results = [name for name in RESULTS if (self.path / name).exists()]
        has_training, has_parts = holds_run(self.path), is_begun(self.path)
        if self.use is FolderUse.result:
            if has_training or has_parts:
                kind = "training run" if has_training else "cache or texts"
                raise UserError(f"{where}: already holds a {kind}; choose another folder")
            goes_on = results == [CURVE_FILE] and config.resume == "auto"
            if results and not config.overwrite and not goes_on:
                raise UserError(
                    f"{where}: already holds {results[0]}; choose another folder, or set overwrite=true to replace it"
                )
        elif has_training and config.resume == "never":
            raise UserError(f"{where}: already holds a run; choose another folder, or continue it with resume=auto")
        elif not has_training and (results or has_parts):
            raise UserError(f"{where}: holds {(*results, BEGUN)[0]} of another run; choose another folder")

    @contextmanager
    def write_whole(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the run's folder if the block ends without error."""
        self.take()
        with atomic_folder(self.path, replaces=False) as temporary:
            yield temporary

    def describe_rest(self) -> str:
        """Return what an interruption left of the run, and how to go on."""
        if self.use is FolderUse.none:
            return "nothing is written; start it again"
        on = f"continue with resume=auto output_dir={self.path}"
        steps = sorted((self.path / "checkpoints").glob("step_[0-9]*"))
        parts = [folder for folder in self.lock.folders if is_begun(folder)]
        written = [name for name in RESULTS if (self.path / name).exists()]
        if self.use is FolderUse.run and steps:
            return f"step {int(steps[-1].name.removeprefix('step_'))} is saved; {on}"
        if self.use is FolderUse.result and (self.path / CURVE_FILE).exists():
            return f"the finished measurements in {self.path / CURVE_FILE} are kept; {on}"
        if parts:
            return f"the finished parts in {parts[0]} are kept; {on}"
        if self.use is FolderUse.result and written and not self.config.overwrite:
            return f"{self.path / written[0]} is written"
        if self.use is FolderUse.whole and self.path.exists():
            return f"{self.path} is complete"
        return "nothing is saved yet; start it again"

    def record(self) -> None:
        """Write config.yaml and provenance.json from rank 0; call it after everything that the run needs was checked.

        Raises:
            UserError: the folder cannot be created.
        """
        from mtptrain.run.distributed import on_rank0  # loads torch, which a plan does not need

        on_rank0(self.write)

    def write(self) -> None:
        """Lock the folder and write config.yaml and provenance.json, on whichever rank calls it."""
        self.take()
        self.provenance = replace(self.provenance, hardware=hardware())  # torch's threads are final only now
        write_text(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        extras = {} if self.on_policy is None else {"on_policy": self.on_policy}
        values = to_json(self.provenance) | extras
        if self.provenance.continues is None:
            del values["continues"]
        write_json(self.path / PROVENANCE_FILE, values)

    def open_trackers(self) -> Trackers:
        """Return the run's trackers, to be used in a `with` statement; ranks other than 0 have none."""
        return Trackers(TrackedRun(self.config.tracking, self.path, self.settings) if is_rank0() else None)

    def open_log(self, trackers: Trackers, start_step: int = 0) -> MetricsLog:
        """Write the run's record and return its metrics log, without rows after `start_step`."""
        self.record()
        has_file = self.config.tracking.metrics_file and is_rank0()
        return MetricsLog(self.path if has_file else None, trackers, start_step)


def is_rank0() -> bool:
    """Return whether this process prints and writes, by the launcher's RANK; without a launcher it does."""
    return os.environ.get("RANK", "0") == "0"


def holds_run(path: Path) -> bool:
    """Return whether a folder holds checkpoints or metrics of a run."""
    metrics = path / METRICS_FILE
    return (path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def check_writable(path: Path) -> None:
    """Refuse a `path` at which no folder can be created or written; create nothing.

    Raises:
        UserError: names the part of the path that stands in the way.
    """
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"output_dir={path}: {nearest} is not a folder; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output_dir={path}: {nearest} cannot be written; choose another folder or change its rights")


def read_provenance(path: Path) -> Provenance:
    """Return the provenance of the run in a folder.

    Raises:
        OSError: the file cannot be read.
        UserError: the file is damaged.
    """
    try:
        values = json.loads((path / PROVENANCE_FILE).read_text(encoding="utf-8"))
        # A resumed run writes its own `on_policy`.
        return from_json(Provenance, {name: value for name, value in values.items() if name != "on_policy"})
    except (ValueError, AttributeError) as error:  # not UTF-8, not JSON, or no provenance
        raise UserError(
            f"output_dir={path}: {PROVENANCE_FILE} is damaged ({error}); restore it, or delete it to continue without"
        ) from None


def open_run_folder(
    config: RunConfig,
    settings: dict[str, object],
    job_folder: Path | None = None,
    use: FolderUse = FolderUse.run,
) -> RunFolder:
    """Return the folder of a run, checked but not created: `RunFolder.claim` creates it.

    Args:
        config: of the run.
        settings: the same as plain values.
        job_folder: of a job of a sweep; None outside a sweep.
        use: what the recipe does with the folder.

    Raises:
        UserError: the folder cannot be written, or another run is writing it; the run to continue has a
            provenance.json that cannot be read; a tracker is unknown or its package is missing.
    """
    check_trackers(config.tracking)
    path = job_folder or Path(config.output_dir or default_output_dir(config.task))
    provenance = describe_run(config.seed)
    try:
        if use is not FolderUse.none:
            check_writable(path)
            require_free(path, "output_dir")
        if (path / PROVENANCE_FILE).exists() and config.resume == "auto":
            provenance = replace(provenance, continues=read_provenance(path))
    except OSError as error:
        raise UserError(f"output_dir={path}: cannot be used ({error.strerror}); choose another folder") from None
    return RunFolder(path, config, settings, provenance, use)
