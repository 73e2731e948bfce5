"""Answers to mistyped names and values, in place of Hydra's: the nearest existing one, and the rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.resources import files
from typing import Any, get_args, get_origin

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mtptrain.config.reads import all_settings
from mtptrain.config.rules import any_of, as_written, did_you_mean, types_of
from mtptrain.config.run import RunConfig

RENAMED = {"decoding.stop_below": "decoding.min_confidence"}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
EXAMPLES = {"data.mixture": "sections, such as data.mixture=[{path:A,weight:2},{path:B}]"}
ITEMS = {int: "whole numbers", float: "numbers", str: "texts"}
NAMED = r"^Could not (?:override|delete from config\.) '([\w.@/]+)'"

# Lines of Hydra's errors about itself, or with advice that leads to a second error.
HINTS = re.compile(
    r"HYDRA_FULL_ERROR|^(full_key|object_type|reference_type|Config search|To append|\|)|provider=|hydra\.cc"
)


def group_choices(group: str) -> list[str]:
    """Return the names that a folder of conf/ offers, sorted; none if there is no such folder."""
    folder = files("mtptrain.conf").joinpath(group)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def no_such_setting(name: str) -> str:
    """Return the answer to an unknown setting."""
    if name in RENAMED:
        return f"{name}: there is no such setting; {name} is now called {RENAMED[name]}"
    section, _, leaf = name.rpartition(".")
    same = sorted(one for one in all_settings() if one.rpartition(".")[2] == leaf)  # in other sections
    near = did_you_mean(name, same) if section else ""
    near = near or (f"; did you mean {any_of(same)}?" if same else did_you_mean(name, _all_names()))
    return f"{name}: there is no such setting{near or '; `--cfg job` lists all of them'}"


def _all_names() -> list[str]:
    names = all_settings()
    return sorted(names | {name.partition(".")[0] for name in names})


def no_such_choice(group: str, choice: str, names: Sequence[str]) -> str:
    """Return the answer to an unknown file of a config group, such as a recipe; `names` are the existing ones."""
    plus = "" if group in ("backbone", "data", "tracking") else "+"
    kind = "recipe" if group == "recipe" else f"choice of {group}"
    return f"{plus}{group}={choice}: there is no such {kind}{_near_and_all(choice, names, 'there are')}"


def _near_and_all(word: str, names: Sequence[str], opening: str) -> str:
    """Return the nearest name, if one is near, and all of them behind two words such as `there are`."""
    near = did_you_mean(word, names)
    opening = f" {opening.capitalize()}" if near else f"; {opening}"
    return f"{near}{opening} {', '.join(names)}"


def wrong_value(error: OmegaConfBaseException) -> str:
    """Return the answer to a value of the wrong type, with the words or the kind of value that its setting accepts."""
    name, value = re.sub(r"\[.*", "", str(error.full_key)), error.value
    lists = [one for one in sorted(all_settings()) if error.object_type in get_args(_type_of(one))]
    if lists:  # OmegaConf names a setting of an item alone
        item: Any = error.object_type
        kind = types_of(item)[name.rpartition(".")[2]]
        return f"{lists[0]}: {name}={as_written(value)}: {_rule(kind, name, str(value))}"
    return f"{name}={as_written(value)}: {_rule(_type_of(name), name, str(value))}"


def _type_of(name: str) -> Any:
    """Return the type of a setting or section, that of the items for a list; None if there is none."""
    kind: Any = RunConfig
    for key in name.split("."):
        kind = next(filter(is_dataclass, (kind, *get_args(kind))), None)
        kind = types_of(kind).get(key) if kind is not None else None
    return kind


def _rule(kind: Any, name: str, value: str) -> str:
    parts = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and one is not type(None)]
    section = next(filter(is_dataclass, parts), None)
    if get_origin(kind) is list:
        items = ITEMS.get(parts[-1], "values")
        return f"must be a list of {EXAMPLES.get(name, f'{items}, such as {name}=[A,B]')}"
    if get_origin(kind) is dict:
        return f"must be a mapping, such as {name}={{A:B}}"
    if section is not None:
        return f"{name} is a section; give one of its settings, such as {name}.{fields(section)[0].name}=VALUE"
    words = [one.value for one in parts[0]] if parts and issubclass(parts[0], Enum) else []
    return f"must be {_words(parts[0])}{did_you_mean(value, words)}"


def _words(kind: type) -> str:
    if issubclass(kind, Enum):
        return any_of([str(one.value) for one in kind])
    return KINDS.get(kind, "another kind of value")


def _is_in_absent_section(argument: str) -> bool:
    """Return whether an argument sets part of a section that a recipe may leave null, such as plan.batch."""
    name = argument.partition("=")[0]
    section = types_of(RunConfig).get(name.partition(".")[0])
    return "." in name and type(None) in get_args(section) and any(map(is_dataclass, get_args(section)))


def _list_above(argument: str) -> str:
    """Return the list of which an argument sets a part, as data.mixture.path does, or nothing."""
    parent = argument.partition("=")[0].lstrip("+~").rpartition(".")[0]
    return parent if parent in all_settings() and get_origin(_type_of(parent)) is list else ""


def composition_message(text: str, error: BaseException | None, arguments: Sequence[str] = ()) -> str:
    """Return the answer to Hydra's error about a command line, on one line.

    Args:
        text: the lines that Hydra printed.
        error: the exception behind them.
        arguments: of the command line.
    """
    if isinstance(error, OverrideParseException):
        return f"{error.override}: is not setting=value; an odd value needs 'setting=\"value\"'; see --help"
    if "Unexpected type for root: NoneType" in text:  # Hydra sets a value in a section that is null
        absent = next(filter(_is_in_absent_section, arguments), None)
        if absent is not None:
            return f"{absent}: this recipe has no {absent.partition('.')[0]} and does not read it; leave it out"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name={choice}: there is one configuration; leave it out and choose +recipe=NAME"
        return no_such_choice(group, choice, error.options or group_choices(group))
    if isinstance(error, ConfigCompositionException):
        answer = _composition_answer(str(error), error.__cause__)
        if answer is not None:
            return answer
    if "Config group override must be" in text:
        names = [argument.lstrip("+").partition("=")[0] for argument in arguments if argument.endswith("=null")]
        for group in filter(group_choices, names):
            return f"{group}=null: must be one of {', '.join(group_choices(group))}"
    return _override_answer(text, arguments) or _own_lines(text)


def _override_answer(text: str, arguments: Sequence[str]) -> str | None:
    """Return the answer to a value that Hydra cannot put into its setting; None to another error."""
    several = re.search(r"^Ambiguous value for argument '(.*)'$", text, re.MULTILINE)
    if several is not None:
        name, _, values = several[1].partition("=")
        return (
            f"{several[1]}: several values are jobs of a sweep, whose command begins with -m; a list has brackets, "
            f"{name}=[{values}], and a text with commas quotes, '{name}=\"{values}\"'"
        )
    merged = re.search(r"^Error merging override [+~]*([\w.]+)=(.*)$", text, re.MULTILINE)
    unknown = re.search(r"^Key '(.*?)' not in ", text, re.MULTILINE)
    if merged is not None and merged[1] in all_settings():
        return f"{merged[1]}={merged[2]}: {_rule(_type_of(merged[1]), merged[1], merged[2])}"
    if merged is not None and unknown is not None:
        return no_such_setting(f"{merged[1]}.{unknown[1]}")
    part = next(filter(_list_above, arguments), None)
    if part is None:
        return None
    return f"{part}: {_list_above(part)} is a list; write the whole list, {_list_above(part)}=[A,B]"


def _composition_answer(text: str, cause: BaseException | None) -> str | None:
    if isinstance(cause, ValidationError) and not str(cause.full_key).startswith("hydra"):
        return wrong_value(cause)
    twice = re.search(r"^(?:Multiple values for )?(\w+)(?:\.| appears more than once)", text)
    if twice is not None:
        name = twice[1]
        return f"+{name}: there is a choice of {name} already; write {name}=NAME without the plus to change it"
    match = re.search(NAMED, text, re.MULTILINE)
    if match is None or match[1].startswith("hydra"):
        return None
    name = match[1]
    if group_choices(name) and "defaults list" in text:
        return f"{name}: is not chosen yet; write it with a plus: {text.split()[-1]}"
    if isinstance(cause, OmegaConfBaseException) and name in all_settings():
        if not is_dataclass(cause.object_type):
            return f"{name}: cannot be replaced as a whole; add to it with +{name}.{cause.key}=VALUE"
        known = [part.name for part in fields(cause.object_type)]
        return f"{name}: its parts have no {cause.key}{_near_and_all(str(cause.key), known, 'they have')}"
    if isinstance(cause, OmegaConfBaseException) and is_dataclass(_type_of(name)):
        return no_such_setting(str(cause.full_key))
    return no_such_setting(name)


def _own_lines(text: str) -> str:
    """Return Hydra's lines without hints about Hydra itself."""
    lines = [line.strip() for line in text.splitlines()]
    if "Traceback (most recent call last):" in lines:  # the folder of a sweep cannot be created
        lines = [line for line in lines if re.match(r"\w+Error: ", line)][-1:]
    return "; ".join(line for line in lines if line and not HINTS.search(line)) + "; see --help"
