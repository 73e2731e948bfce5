"""The help: of all recipes in `--help`, and of one recipe with the settings that it reads."""

from __future__ import annotations

import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from mtptrain.config import LossName, RunConfig
from mtptrain.config.reads import Settings
from mtptrain.config.rules import as_written, types_of
from mtptrain.config.typos import group_choices

INDENT, NAME_WIDTH = "  ", 19
MOST_WIDTH = 100
# Files of conf/ that a word chooses, by a setting that every recipe with such a choice reads.
CHOICES = {
    "backbone.name": "backbone",
    "data.source": "data",
    "hardware.name": "hardware",
    "model.name": "model",
    "tracking.trackers": "tracking",
}


def recipe_comments(name: str) -> list[str]:
    """Return the comment lines at the top of conf/recipe/NAME.yaml; none for a recipe of the user's own."""
    path = files("mtptrain.conf").joinpath("recipe", f"{name}.yaml")
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    count = next((number for number, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return [line.removeprefix("# ") for line in lines[:count]]


def list_recipes() -> str:
    """Return a line for every recipe: its name and the first comment below `# @package` in conf/recipe/NAME.yaml."""
    return "\n".join(f"{INDENT}{name:{NAME_WIDTH}}{recipe_comments(name)[0]}" for name in group_choices("recipe"))


@contextmanager
def wrapping_lines() -> Iterator[None]:
    """Wrap lines printed meanwhile to the width of the terminal (COLUMNS), further ones below their second column."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        for line in text.getvalue().splitlines():
            print(_wrap(line, width) if len(line) > width else line)


def _wrap(line: str, width: int) -> str:
    first = re.match(r" *((?:\S+ )*\S+ {3,}|[^\s=]+ {2,})?", line)
    indent = len(first[0]) if first and len(first[0]) < width // 2 else len(INDENT * 3)
    return _fill(line, width, " " * indent)


def _fill(line: str, width: int, indent: str) -> str:
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def register_help() -> None:
    """Register the resolvers that the help text in conf/config.yaml uses."""
    OmegaConf.register_new_resolver("recipes", list_recipes, replace=True)
    OmegaConf.register_new_resolver("losses", lambda: "|".join(LossName), replace=True)
    OmegaConf.register_new_resolver("options", lambda group: "|".join(group_choices(group)), replace=True)


def print_recipe_help(name: str, config: RunConfig) -> None:
    """Print a recipe's purpose, and every setting that it reads with the rest of `config`, with value and meaning."""
    from mtptrain.recipes import find_recipe
    from mtptrain.run.progress import waiting

    with waiting("importing PyTorch"):
        recipe = find_recipe(config.task)
    print("\n".join(recipe_help(name, config, recipe.reads(config))))


def recipe_help(name: str, config: RunConfig, reads: Settings) -> Iterator[str]:
    """Yield the lines of a recipe's help, no wider than the terminal (COLUMNS)."""
    width = min(MOST_WIDTH, shutil.get_terminal_size().columns)
    yield textwrap.fill(" ".join(recipe_comments(name)), width)
    yield "\n" + textwrap.fill(f"Usage: mtptrain {name} [setting=value ...]", width) + "\n"
    choices = [group for setting, group in CHOICES.items() if setting in reads]
    if choices:
        yield textwrap.fill(f"Choices, each with settings of its own (mtptrain {name} CHOICE --help):", width)
        yield from (f"{INDENT}{group}={'|'.join(group_choices(group))}" for group in choices)
        yield ""
    yield "Settings that it reads:"
    section = ""
    for setting in sorted(reads - {"task"}, key=lambda one: ("." in one, one)):
        if setting.rpartition(".")[0] != section:
            section = setting.rpartition(".")[0]
            yield ""
        yield describe_setting(setting, config, width)


def describe_setting(setting: str, config: RunConfig, width: int) -> str:
    """Return a setting with its value, its words if it has a few, and the comment beside its field."""
    value: Any = config
    note = ""
    for key in setting.split("."):
        schema: Any = type(value)
        note = "" if value is None else field_notes(schema).get(key, "")  # a section may be null
        value = getattr(value, key, None)
    words = "|".join(str(one.value) for one in type(value)) if isinstance(value, Enum) else ""
    text = "; ".join(filter(None, [words, note]))
    shown = as_written(value)
    if len(shown) > width:  # such as the layers of a model
        shown = f"{shown[: width // 2]}..."
    line = f"{INDENT}{setting}={shown}  {text}".rstrip()
    return _fill(line, width, INDENT * 3)


@cache
def field_notes(schema: type) -> dict[str, str]:
    """Return the comment of every field of a settings class: the lines above it, or the end of its own."""
    return dict(_notes(inspect.getsource(schema).splitlines(), set(types_of(schema))))


def _notes(lines: list[str], names: set[str]) -> Iterator[tuple[str, str]]:
    above: list[str] = []
    for line in map(str.strip, lines):
        name = line.partition(":")[0]
        if line.startswith("# "):
            above.append(line.removeprefix("# "))
            continue
        if name in names and ":" in line:
            _, _, behind = line.partition("  # ")
            yield name, " ".join([*above, behind]).strip()
        above = []
