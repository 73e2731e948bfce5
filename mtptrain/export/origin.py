"""Where an exported head comes from: the run that trained it, and the model that it belongs to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtptrain.errors import UserError
from mtptrain.evaluation.result import EVALUATION_FILE, Evaluation, read_evaluation
from mtptrain.training.checkpoint import Checkpoint

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # of the hub's cache
TRAINED_ON = ("source", "path", "mixture", "packages", "chat_template")  # settings that say what was trained on


@dataclass(frozen=True, slots=True)
class Origin:
    """The facts about model and training that the files beside them state.

    Attributes:
        base_model: hub id of the model; None if its folder does not show one.
        license: as in the model's card; None if it states none.
        data: the training data, for people to read; None if the run's settings are not there.
        training: provenance of the training run, empty if it is not recorded.
    """

    base_model: str | None
    license: str | None
    data: str | None
    training: dict[str, Any]


def find_origin(checkpoint: Checkpoint, source: Path, path: str | None) -> Origin:
    """Return the origin of a checkpoint's head.

    Args:
        checkpoint: the head.
        source: folder of the model.
        path: the setting `backbone.path`, a folder or a hub id.
    """
    provenance = _in_run(checkpoint, "provenance.json")
    training: dict[str, Any] = json.loads(provenance.read_text(encoding="utf-8")) if provenance else {}
    return Origin(hub_id(source, path), _license(source), _training_data(checkpoint), training)


def own_evaluation(checkpoint: Checkpoint) -> Evaluation | None:
    """Return the evaluation in the folder of a checkpoint's run; None without one that can be read."""
    file = _in_run(checkpoint, EVALUATION_FILE)
    if file is None:
        return None
    try:
        evaluation = read_evaluation(file, "checkpoint")
    except UserError:  # of an earlier version
        return None
    return evaluation if evaluation.last_head.name == "trained" else None


def _in_run(checkpoint: Checkpoint, name: str) -> Path | None:
    """Return a file of the run that holds a checkpoint, as RUN/step_N or RUN/checkpoints/step_N."""
    candidates = (folder / name for folder in checkpoint.folder.absolute().parents[:2])
    return next((path for path in candidates if path.is_file()), None)


def hub_id(source: Path, path: str | None) -> str | None:
    """Return the hub id of a model from the setting `backbone.path` or from its folder in the hub's cache, or None."""
    if path is not None and path.count("/") == 1 and not Path(path).exists():
        return path
    cached = HUB_FOLDER.search(str(source.absolute()))
    return f"{cached[1]}/{cached[2]}" if cached else None


def _license(source: Path) -> str | None:
    card = source / "README.md"
    front = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    try:
        stated = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    license_ = stated.get("license") if isinstance(stated, dict) else None
    return license_ if isinstance(license_, str) else None


def _training_data(checkpoint: Checkpoint) -> str | None:
    file = _in_run(checkpoint, "config.yaml")
    if file is None:
        return None
    data = yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}
    parts = [f"{name} {data[name]}" for name in TRAINED_ON if data.get(name)]
    tokens = checkpoint.counters.get("tokens")
    return ", ".join([*parts, *([f"{tokens:,} tokens"] if tokens else [])])
