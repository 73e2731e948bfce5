"""Record the settings that a run reads, to compare them with the declaration of its recipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from dataclasses import replace as dataclass_replace
from functools import cache
from types import FrameType
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from mtptrain.config import RunConfig
from mtptrain.config.reads import section_of

# Functions that read settings without any effect on the result: checks, and records of a whole section.
WITHOUT_EFFECT = {
    "Session._check_window",
    "__post_init__",
    "backbone_card",
    "check",
    "check_given",
    "check_trackers",
    "choose_source",
    "describe_run",
    "find_recipe",
    "fitting",
    "join",
    "open_run_folder",
    "result_settings",
    "_streamed_source",
    "reads",
    "TextOrigin.of",
    "_refuse_sharing",
    "to_json",
}
COPIES = ("mtptrain.config.data", "mtptrain.recipes.backbone")  # modules that change settings with `replace`


def _sections(schema: type) -> Iterator[type]:
    yield schema
    for kind in get_type_hints(schema).values():
        for part in filter(is_dataclass, (kind, *get_args(kind))):
            yield from _sections(part)  # type: ignore[arg-type]


@cache
def _single_settings(schema: type) -> frozenset[str]:
    """Return the fields of a section that are no sections, such as an optional one that is null."""
    return frozenset(name for name, kind in get_type_hints(schema).items() if section_of(kind) is None)


def _has_effect(frame: FrameType | None) -> bool:
    """Return whether our code reads a setting to use it; properties of the settings read for their caller."""
    while frame is not None:
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        is_property = module == __name__ or module.startswith("mtptrain.config")
        function = code.co_qualname.partition(".<locals>")[0]
        if function in WITHOUT_EFFECT or code.co_name in WITHOUT_EFFECT:
            return False
        if not is_property:
            return bool(module.startswith("mtptrain."))  # not copies by `dataclasses` and `omegaconf`
        frame = frame.f_back
    return False


class Reads:
    """The settings that were read: their dotted `names`, and the `config` that they belong to.

    Only the run's own sections count, and copies of them: a head may be measured with a section that is made in code.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.config: RunConfig | None = None
        self._prefixes: dict[int, str] = {}  # of the run's sections, by id
        self._replaced: set[tuple[int, str]] = set()  # fields of copies with a value of the program's own
        self._kept: list[object] = []  # ids stay unique only while the objects live

    def open(self, config: RunConfig) -> None:
        """Count reads of this configuration from now on."""
        self.config = config
        self._add(config, "")

    def _add(self, section: Any, prefix: str) -> None:
        self._prefixes[id(section)] = prefix
        self._kept.append(section)
        for part in fields(section):
            value = object.__getattribute__(section, part.name)
            for one in value if isinstance(value, list) else [value]:
                if is_dataclass(one):
                    self._add(one, f"{prefix}{part.name}.")

    def get(self, section: Any, name: str) -> Any:
        """Return an attribute of a section, and record it if it is a setting that is read with effect."""
        value = object.__getattribute__(section, name)
        prefix = self._prefixes.get(id(section))
        is_setting = name in _single_settings(type(section)) and (id(section), name) not in self._replaced
        if prefix is None or not is_setting or (setting := f"{prefix}{name}") in self.names:
            return value
        if _has_effect(sys._getframe(2)):
            self.names.add(setting)
        return value

    def replace(self, section: Any, **changes: Any) -> Any:
        """`dataclasses.replace`, for which a copy counts as its source except for the changed fields."""
        copy = dataclass_replace(section, **changes)
        if id(section) in self._prefixes:
            self._prefixes[id(copy)] = self._prefixes[id(section)]
            self._kept.append(copy)
            self._replaced |= {(id(copy), name) for name in changes}
        return copy


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Yield the record of the settings that a command reads in this process."""
    reads = Reads()

    def getter(section: Any, name: str) -> Any:
        return reads.get(section, name)

    from mtptrain import cli

    def run_task(config: RunConfig, *arguments: Any) -> None:
        reads.open(config)
        plain(config, *arguments)

    plain: Callable[..., None] = cli.run_task
    with ExitStack() as stack:
        stack.enter_context(patch.object(cli, "run_task", run_task))
        for module in COPIES:
            stack.enter_context(patch(f"{module}.replace", reads.replace))
        for schema in set(_sections(RunConfig)):
            stack.enter_context(patch.object(schema, "__getattribute__", getter))
        yield reads
