"""The content of sweep.json as types: the jobs of a sweep and their results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

from mtptrain.errors import UserError
from mtptrain.evaluation.comparison_result import COMPARISON_FILE, Comparison, read_comparison
from mtptrain.evaluation.result import EVALUATION_FILE, Evaluation, read_evaluation
from mtptrain.evaluation.stored import ResultFile
from mtptrain.run.record import RunRecord, read_record
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import to_json

SWEEP_FILE = "sweep.json"
SWEEP_SCHEMA = 1
T = TypeVar("T")


class JobOutcome(Enum):
    """The end of a job of a sweep."""

    done = "done"
    uncertified = "certificate failed"  # or the doctor found a fault: written, exit code 3
    failed = "failed"
    stopped = "stopped"  # by a signal: it can go on


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        settings: the varied settings, by name.
        folder: name of its folder within the folder of the sweep.
        outcome: its end.
        exit_code: the exit code of the same command outside of a sweep.
        reason: of a failure, in words; None without one.
        seconds: duration.
    """

    settings: dict[str, str]
    folder: str
    outcome: JobOutcome
    exit_code: int
    reason: str | None
    seconds: float

    @property
    def label(self) -> str:
        """The varied settings, as on the command line; the folder if nothing is varied."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items()) or self.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """The content of sweep.json.

    Attributes:
        schema: `SWEEP_SCHEMA`.
        command: with which it was started, in the form +recipe=NAME.
        started: local time with its offset.
        git_commit: of the checkout, see `provenance.git_commit`.
        jobs: in the order in which they ran.
    """

    schema: int
    command: list[str]
    started: str
    git_commit: str | None
    jobs: list[SweepJob]


@dataclass(frozen=True, slots=True)
class JobFigures:
    """What a job has written into its folder; None for a result that it has not.

    Attributes:
        evaluation, comparison: results.
        record: of its training.
    """

    evaluation: Evaluation | None
    comparison: Comparison | None
    record: RunRecord | None


def read_figures(folder: Path) -> JobFigures:
    """Return the results in the folder of a job; one that is missing or cannot be read is None."""
    evaluation, comparison = folder / EVALUATION_FILE, folder / COMPARISON_FILE
    return JobFigures(
        evaluation=_read(lambda: read_evaluation(evaluation, "sweep")),
        comparison=_read(lambda: read_comparison(comparison, "sweep")),
        record=_read(lambda: read_record(folder)),
    )


def _read(read: Callable[[], T]) -> T | None:
    with suppress(UserError, OSError):
        return read()
    return None


def write_sweep(path: Path, sweep: SweepResult) -> None:
    """Write a sweep.json, atomically."""
    write_json(path, to_json(sweep))


_FILE = ResultFile(
    content=SweepResult,
    name=SWEEP_FILE,
    schema=SWEEP_SCHEMA,
    wanted=f"a {SWEEP_FILE} or its folder",
    again="sweep again",
)


def read_sweep(path: Path, setting: str) -> SweepResult:
    """Return the sweep of a file or a folder; see `ResultFile.read`."""
    return _FILE.read(path, setting)
