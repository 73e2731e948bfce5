"""Trackers show a run outside its folder. Each is a module of this package; `tracking.trackers` selects it by name.

A module defines `PACKAGES`, the packages that it imports, and `begin(run) -> Tracker`, which starts a run or continues
the run that an interrupted job began in the same folder. With `run.beside`, `begin` joins that run and leaves its state
to its own process. See CONTRIBUTING.md, "Add a tracker".

accelerate's trackers are not used. Each call needs its `PartialState`, which waits for the other processes of a job
even after they have ended. Its TensorBoard and MLflow trackers write no tables, and its MLflow tracker reports every
run as finished.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mtptrain.config import TrackingConfig
from mtptrain.errors import UserError


class Tracker(Protocol):
    """One run in one tracker. If a method raises, `Trackers` stops using the tracker and the run continues."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a training step; values may be NaN or infinite."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table under a name such as `evaluation/speedup`."""

    def artifact(self, name: str, kind: str, files: Sequence[Path], texts: Mapping[str, str]) -> None:
        """Store files, whole folders and texts (by file name) as one group of files."""

    def finish(self, failed: bool) -> None:
        """Send what is left and end the run; `failed` if the job ends with an error."""


@dataclass(slots=True)
class TrackedRun:
    """The part of a run that trackers use.

    Attributes:
        config: project, name, group and tags.
        folder: the run's folder.
        settings: the resolved configuration as plain values.
        start_step: the step at which training starts or continues; None before training.
        last_step: the last step that an interrupted process of the run has logged; None if there was none.
        beside: own folder of a process that shows rows of its own in the run of `folder`, which another process may be
            writing at the same time; None for the run itself.
    """

    config: TrackingConfig
    folder: Path
    settings: dict[str, object]
    start_step: int | None = None
    last_step: int | None = None
    beside: Path | None = None

    @property
    def group(self) -> str:
        """Return the name that groups runs: by default that of the parent of the run's folder."""
        return self.config.group or self.folder.absolute().parent.name


def unlogged(step: int, metrics: Mapping[str, float], logged_steps: Mapping[str, int]) -> dict[str, float]:
    """Return the metrics that a tracker does not have at `step` yet, for trackers that only append.

    Args:
        step: of the metrics.
        metrics: of that step.
        logged_steps: the last step that the tracker has, by metric.
    """
    return {name: value for name, value in metrics.items() if step > logged_steps.get(name, -1)}


def known_trackers() -> list[str]:
    """Return the names of all trackers, the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_trackers(config: TrackingConfig) -> None:
    """Refuse unknown trackers and trackers whose packages are not installed.

    Raises:
        UserError: names the tracker, and the known names or the command that installs its package.
    """
    for name in config.chosen:
        if name not in known_trackers():
            raise UserError(f"tracking.trackers.{name}: unknown tracker; choose from {', '.join(known_trackers())}")
        packages: tuple[str, ...] = import_module(f"{__name__}.{name}").PACKAGES
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise UserError(f"tracking={name}: the package {missing[0]} is missing; run: pip install {packages[0]}")


def begin_tracker(name: str, run: TrackedRun) -> Tracker:
    """Start or continue a run in the tracker called `name`; let every exception of its package pass."""
    tracker: Tracker = import_module(f"{__name__}.{name}").begin(run)
    return tracker
