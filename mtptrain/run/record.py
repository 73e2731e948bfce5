"""The record of a training, metrics.jsonl, as curves; the run may still be going on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtptrain.config.backbone import backbone_words
from mtptrain.run.folder_lock import is_held
from mtptrain.run.tracking import METRICS_FILE, read_rows

STOCK_HEAD = "stock_head"  # the folder of the second training of +recipe=backbone, and its section of settings


@dataclass(slots=True)
class MetricCurve:
    """The values of a metric by training step, in the order of the steps; NaN where the run had no finite value."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> float | None:
        """The last finite value; None if there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), None)

    def cut(self, step: int) -> None:
        """Drop the values from a step on."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run has recorded so far.

    Attributes:
        folder: of the run.
        task: the recipe's program; None if its config.yaml cannot be read.
        num_steps: of the whole training; None if unknown.
        last_step: of the last row.
        is_running: whether a process holds the folder.
        curves: by name of the metric.
        backbone: settings that choose its backbone, for another command on the run.
    """

    folder: Path
    task: str | None
    num_steps: int | None
    last_step: int
    is_running: bool
    curves: dict[str, MetricCurve]
    backbone: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether the last step has been recorded."""
        return self.num_steps is not None and self.last_step >= self.num_steps

    def numbered(self, prefix: str, suffix: str = "") -> dict[int, MetricCurve]:
        """Return the curves whose names are a number between prefix and suffix, by this number."""
        curves = {}
        for name, curve in self.curves.items():
            number = name.removeprefix(prefix).removesuffix(suffix)
            if name == f"{prefix}{number}{suffix}" and number.isdecimal():
                curves[int(number)] = curve
        return dict(sorted(curves.items()))


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of the run in a folder; None if it has no rows.

    A row after a step that is recorded already replaces everything from that step on, so that a resumed run has one
    value a step.

    Raises:
        OSError: metrics.jsonl exists and cannot be read.
    """
    curves: dict[str, MetricCurve] = {}
    last = -1
    for step, metrics in _rows(folder / METRICS_FILE):
        if step < last:
            for curve in curves.values():
                curve.cut(step)
        last = step
        for name, value in metrics.items():
            curve = curves.setdefault(name, MetricCurve())
            curve.cut(step)
            curve.steps.append(step)
            curve.values.append(value)
    if last < 0:
        return None
    stored = stored_settings(folder)
    task = stored.get("task")
    backbone = _section(stored, "backbone")
    steps = _section(stored, STOCK_HEAD if folder.name == STOCK_HEAD else "train").get("steps")
    return RunRecord(
        folder=folder,
        task=task if isinstance(task, str) else None,
        num_steps=steps if isinstance(steps, int) else None,
        last_step=last,
        is_running=is_held(folder),
        curves={name: curve for name, curve in curves.items() if curve.last is not None},
        backbone=backbone_words(backbone.get("name"), backbone.get("path")),
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of every row with a step."""
    for row in read_rows(path):
        if isinstance(step := row.pop("step", None), int):
            known = {name: value for name, value in row.items() if isinstance(value, int | float) or value is None}
            yield step, {name: math.nan if value is None else float(value) for name, value in known.items()}


def stored_settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings in a run's config.yaml; none if it has not written them yet or they cannot be read."""
    try:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _section(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = stored.get(name)
    return section if isinstance(section, dict) else {}


def run_section(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the settings of a run in one section; none if it has not written them yet."""
    return _section(stored_settings(folder), name)
