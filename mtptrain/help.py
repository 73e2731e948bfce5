"""The lists of recipes, losses and trackers in `--help`, read from their sources so that none is written twice."""

from __future__ import annotations

from importlib.resources import files

from omegaconf import OmegaConf

from mtptrain.config import LossName
from mtptrain.config.typos import group_choices

INDENT, NAME_WIDTH = "  ", 18


def list_recipes() -> str:
    """Return a line for every recipe: its name and the first comment below `# @package` in conf/recipe/NAME.yaml."""
    lines = []
    for name in group_choices("recipe"):
        text = files("mtptrain.conf").joinpath("recipe", f"{name}.yaml").read_text(encoding="utf-8")
        comments = (line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
        summary = next((line for line in comments if not line.startswith("@package")), "")
        lines.append(f"{INDENT}{name:{NAME_WIDTH}}{summary}")
    return "\n".join(lines)


def register_help() -> None:
    """Register the resolvers that the help text in conf/config.yaml uses."""
    OmegaConf.register_new_resolver("recipes", list_recipes, replace=True)
    OmegaConf.register_new_resolver("losses", lambda: "|".join(LossName), replace=True)
    OmegaConf.register_new_resolver("options", lambda group: "|".join(group_choices(group)), replace=True)
