"""Trackers show a run outside its folder. Each is a module of this package, which `tracking.trackers` names.

A module defines `PACKAGES`, the packages that it imports, and `begin(run) -> Tracker`, which starts a run or continues
the one that an interrupted job began in the same folder. See CONTRIBUTING.md, "Add a tracker".

accelerate's trackers are not used. Each call needs its `PartialState`, which waits for the other processes of a job
even after they have ended; TensorBoard's and MLflow's write no tables, and MLflow's reports every run as finished.
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
    """One run in one tracker. Any method may raise; `Trackers` then stops using the tracker and the run goes on."""

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
    """A run as its trackers see it.

    Attributes:
        config: project, name, group and tags.
        folder: the run's folder.
        settings: the resolved configuration as plain values.
        start_step: the step that training starts from; None until training starts.
    """

    config: TrackingConfig
    folder: Path
    settings: dict[str, Any]
    start_step: int | None = None

    @property
    def group(self) -> str:
        """Return the name shared by runs that belong together: by default that of the folder around the run's."""
        return self.config.group or self.folder.absolute().parent.name


def unlogged(step: int, metrics: Mapping[str, float], logged_steps: Mapping[str, int]) -> dict[str, float]:
    """Return the metrics that were not logged at `step` before, for trackers that only append.

    Args:
        step: of the metrics.
        metrics: of that step.
        logged_steps: the last step of each metric that the tracker has.
    """
    return {name: value for name, value in metrics.items() if step > logged_steps.get(name, -1)}


def known_trackers() -> list[str]:
    """Return the names of all trackers, which are the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_trackers(config: TrackingConfig) -> None:
    """Refuse trackers that do not exist and those whose packages are not installed.

    Raises:
        UserError: names the tracker and either the known names or the command that installs its package.
    """
    for name in config.chosen:
        if name not in known_trackers():
            raise UserError(f"tracking.trackers.{name}: unknown tracker; choose from {', '.join(known_trackers())}")
        packages: tuple[str, ...] = import_module(f"{__name__}.{name}").PACKAGES
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise UserError(f"tracking={name}: the package {missing[0]} is missing; run: pip install {packages[0]}")


def begin_tracker(name: str, run: TrackedRun) -> Tracker:
    """Start or continue a run in the tracker called `name`; raise anything that its package raises."""
    tracker: Tracker = import_module(f"{__name__}.{name}").begin(run)
    return tracker
