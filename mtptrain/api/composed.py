"""Settings from Python, composed and checked as those of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from mtptrain.cli import typed_config
from mtptrain.config import RunConfig, register
from mtptrain.config.arguments import quoted
from mtptrain.config.given import Given, given_settings
from mtptrain.config.rules import as_written
from mtptrain.config.typos import composition_message
from mtptrain.errors import UserError
from mtptrain.help import register_help

Settings = Mapping[str, Any]  # by the names of the command line, such as {"train.steps": 40}
PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # a word that needs no quotes
WORDS = ("null", "true", "false", "nan", "inf")  # of Hydra's grammar, in any case


class Composed(NamedTuple):
    """The settings of a run: typed, as plain values, and the user's part of them."""

    config: RunConfig
    settings: dict[str, object]
    given: Given


def written(value: Any) -> str:
    """Return a value as the command line writes it, with quotes around texts that need them."""
    return as_written(value, lambda text: text if PLAIN.fullmatch(text) and text.lower() not in WORDS else quoted(text))


def arguments_of(recipe: str, settings: Settings) -> list[str]:
    """Return the arguments of the command line that runs a recipe with some settings."""
    return [f"+recipe={recipe}", *(f"{name}={written(value)}" for name, value in settings.items())]


def compose_run(arguments: Sequence[str]) -> Composed:
    """Return the settings of a command line.

    Raises:
        UserError: a setting is unknown, has the wrong type or is out of range.
    """
    register()
    register_help()
    try:
        with initialize_config_module("mtptrain.conf", version_base="1.3"):
            composed = compose("config", list(arguments), return_hydra_config=True)
            given = given_settings(composed.hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(composition_message(str(error), error, arguments)) from None
    with open_dict(composed):
        del composed["hydra"]
    return Composed(*typed_config(composed, given), given)
