"""Shapes of the presets, read from the files that `backbone=` and `model=` compose."""

import yaml

from mtptrain.config import ShapeConfig
from tests.command import ROOT


def preset_shape(name: str) -> ShapeConfig:
    """Shape of conf/backbone/<name>.yaml."""
    values = yaml.safe_load((ROOT / "conf" / "backbone" / f"{name}.yaml").read_text(encoding="utf-8"))
    return ShapeConfig(**values.get("shape", {}))
