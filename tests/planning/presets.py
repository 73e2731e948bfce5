"""Shapes of the presets, read from the files that `backbone=` and `model=` compose, and a provenance for plans."""

import yaml

from mtptrain.config import ShapeConfig
from mtptrain.run.provenance import Hardware, Provenance
from tests.command import ROOT

PROVENANCE = Provenance(
    command=["python", "-m", "mtptrain"],
    started="2026-01-01T00:00:00+0000",
    git_commit=None,
    versions={},
    hardware=Hardware("a CPU", cores=1),
    seed=0,
)


def preset_shape(name: str) -> ShapeConfig:
    """Return the shape in conf/backbone/<name>.yaml."""
    values = yaml.safe_load((ROOT / "conf" / "backbone" / f"{name}.yaml").read_text(encoding="utf-8"))
    return ShapeConfig(**values.get("shape", {}))
