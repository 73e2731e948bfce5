"""The words of a command line, as a user writes them, in the form that Hydra reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mtptrain.config.paths import expand_argument
from mtptrain.config.verbosity import Verbosity

WITH_VALUE = (  # Hydra's options that are followed by a word of their own
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--cfg", "-c", "--package", "-p", "--experimental-rerun"),
)
FLAGS = {"--plan": "collect.plan_only=true"}  # Hydra accepts no options of other programs
TEXTS = ("prompt",)  # settings with any text as their value
NAME = re.compile(r"[\w-]+(,[\w-]+)*")  # of a recipe; a sweep may take several
QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)


@dataclass(slots=True)
class CommandLine:
    """A command line in parts.

    Attributes:
        options: Hydra's options with their values.
        settings: the overrides, of which the first may be the name of a recipe.
        wants_help: whether the help of the recipe is wanted; that of all of them is Hydra's.
        wants_version: whether the version is wanted.
        verbosity: how much a run says.
        is_short: whether the recipe is named by a word alone.
    """

    options: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    wants_help: bool = False
    wants_version: bool = False
    verbosity: Verbosity = Verbosity.normal
    is_short: bool = False

    @property
    def words(self) -> list[str]:
        """The words for Hydra: options first, as its parser wants them."""
        return [*self.options, *self.settings]


def _option(field_name: str, value: Any) -> Callable[[CommandLine], None]:
    return lambda line: setattr(line, field_name, value)


OPTIONS = {  # of this program; Hydra has others
    **dict.fromkeys(("--help", "-h"), _option("wants_help", True)),
    "--version": _option("wants_version", True),
    **dict.fromkeys(("--quiet", "-q"), _option("verbosity", Verbosity.quiet)),
    **dict.fromkeys(("--verbose", "-v"), _option("verbosity", Verbosity.verbose)),
}


def read_arguments(words: list[str]) -> CommandLine:
    """Return a command line in parts; `distill a=1 -m` and `-m +recipe=distill a=1` are the same.

    Args:
        words: of the command, without its name.
    """
    line, rest = CommandLine(), list(words)
    while rest:
        word = rest.pop(0)
        if word in OPTIONS:
            OPTIONS[word](line)
        elif word.startswith("-") and word not in FLAGS:
            num_values = 1 if word in WITH_VALUE else 0
            line.options += map(expand_argument, [word, *rest[:num_values]])
            rest = rest[num_values:]
        else:
            line.is_short |= not line.settings and bool(NAME.fullmatch(word))
            line.settings.append(_setting(FLAGS.get(word, word), is_first=not line.settings))
    if not words or (line.wants_help and not any(one.startswith("+recipe=") for one in line.settings)):
        line.wants_help, line.options = False, ["--help"]
    return line


def completion_line(line: str) -> str:
    """Return a shell's line to complete with the recipe in Hydra's form, if it begins with one."""
    return re.sub(r"^(\s*\S+\s+)([\w-]+)(?=\s)", r"\1+recipe=\2", line)


def is_first_word(line: str) -> bool:
    """Return whether a shell's line to complete ends with the first word behind the command, or before it."""
    return re.fullmatch(r"\s*\S+\s+[\w-]*", line) is not None


def _setting(word: str, is_first: bool) -> str:
    """Return a word as an override: the first one may be the name of a recipe, and a text needs no quotes."""
    if is_first and NAME.fullmatch(word):
        return f"+recipe={word}"
    name, _, value = word.partition("=")
    if name.lstrip("+") in TEXTS and value != "null" and not QUOTED.fullmatch(value):
        return f"{name}={quoted(_without_references(value))}"
    return expand_argument(word)


def quoted(text: str) -> str:
    """Return a text in Hydra's quotes, where a backslash is itself unless a quote follows; `${` begins a reference."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _without_references(text: str) -> str:
    return re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", text)
