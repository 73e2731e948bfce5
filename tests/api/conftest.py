from pathlib import Path
from typing import Any

import pytest
import yaml

import mtptrain
from tests.command import Light, fitting


@pytest.fixture(scope="session")
def backbone(backbone_folder: Path) -> mtptrain.LoadedBackbone:
    """The random backbone, loaded."""
    return mtptrain.load_backbone(backbone_folder)


def small_settings(light: list[str], recipe: str) -> dict[str, Any]:
    """Return the settings of the `light` fixture that a recipe reads, as a user gives them in Python."""
    at_end = ["evaluate_at_end=false"] if recipe == "distill" else []  # `train` does not measure
    fitted = fitting([f"+recipe={recipe}", *at_end, *light])
    pairs = (one.partition("=") for one in fitted if isinstance(one, Light))
    return {name: yaml.safe_load(value) for name, _, value in pairs if name != "backbone.path"}
