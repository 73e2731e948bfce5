"""The names of the jobs of a sweep (`-m`): the settings that it varies, as names of folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import product
from typing import TYPE_CHECKING

from mtptrain.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

LONGEST = 100  # characters of a name: room for the endings of locks and temporary files below the usual 255 bytes
UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")  # Hydra would not take `=` or a comma in `checkpoint=outputs/sweep/...`
FLAGS = ("-m", "--multirun")


def varied_settings(job: Sequence[str], command: Sequence[str]) -> dict[str, str]:
    """Return the settings of a job that its sweep varies, by name, in the order of the command.

    Of a setting that the command gives twice the last value counts, as everywhere.

    Args:
        job: the overrides of the job, as Hydra passes them.
        command: the arguments of the command, options among them.
    """
    is_swept = {override.key_or_group: override.is_sweep_override() for override in _overrides(command)}
    varied = [override for override in _overrides(job) if is_swept.get(override.key_or_group, True)]
    return {str(override.key_or_group): _value_text(override) for override in varied if not override.is_delete()}


def _value_text(override: Override) -> str:
    value = override.value()
    return value if isinstance(value, str) else override.get_value_element_as_str()


def _overrides(arguments: Sequence[str]) -> list[Override]:
    """Return the overrides among some arguments; options are none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, overrides = OverridesParser.create(), []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        try:
            overrides.append(parser.parse_override(argument))
        except HydraException:  # the value of an option, such as --config-dir
            continue
    return overrides


def job_name(varied: dict[str, str], number: int) -> str:
    """Return the name of a job's folder: `loss.divergence-kl+train.steps-100`.

    A name that has lost characters, because they are odd or too many, ends with a digest, so that no two are alike.

    Args:
        varied: the settings that the sweep varies.
        number: of the job, which names it if nothing is varied.
    """
    text = "+".join(f"{name}-{value}" for name, value in varied.items())
    if not text:
        return f"job{number}"
    name = UNSAFE.sub("_", text)[:LONGEST]
    return name if name == text else f"{name}-{sha256(text.encode()).hexdigest()[:8]}"


def first_job(command: Sequence[str]) -> list[str]:
    """Return the arguments of a sweep's first job, to describe it; those of any other command as they are."""
    if not any(flag in command for flag in FLAGS):
        return list(command)
    first = {}
    for override in _overrides(command):
        if override.is_sweep_override():
            value = next(override.sweep_string_iterator())
            first[override.input_line] = f"{override.get_key_element()}={value}"
    return [first.get(word, word) for word in command if word not in FLAGS]


def job_arguments(command: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of every job of a sweep, in order."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in _overrides(command)
    ]
    return map(list, product(*choices))


def check_command(command: Sequence[str]) -> None:
    """Refuse a sweep over `output_dir`, whose jobs have a folder each below one.

    Raises:
        UserError: the command is a sweep over it.
    """
    if not any(flag in command for flag in FLAGS):
        return
    for override in _overrides(command):
        if override.key_or_group == "output_dir" and override.is_sweep_override():
            raise UserError(
                "output_dir: a sweep needs one folder, in which every job gets its own, named by its settings; give one"
            )
