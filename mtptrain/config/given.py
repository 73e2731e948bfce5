"""The settings that a user gave: on the command line, and in YAML files of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtptrain.config.choices import DataSource
from mtptrain.config.rules import require
from mtptrain.config.typos import group_choices

MANIFEST = "manifest.json"  # of a folder that +recipe=collect wrote
SOURCES = ("source", "mixture")  # settings of data that say where it comes from
OUR_PROVIDERS = ("hydra", "main", "schema")  # of Hydra's search path; a user's folders have other names


@dataclass(frozen=True, slots=True)
class Given:
    """The settings that a user gave.

    Attributes:
        values: dotted names of single settings; mixtures and other lists count as one.
        groups: the chosen file of a config group by its name, such as `data: text`, the user's own files among them;
            without the recipe.
        is_sweep: whether this is one of several jobs, which share a command line.
    """

    values: frozenset[str]
    groups: Mapping[str, str]
    is_sweep: bool = False

    def chose_source(self) -> bool:
        """Return whether the user named a source of data."""
        return "data.source" in self.values or "data.mixture" in self.values or "data" in self.groups


def given_settings(job: Any) -> Given:
    """Return the settings that the user gave; `job` is Hydra's own section of the composed configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    overrides = [str(one) for one in OmegaConf.to_container(job.overrides.task, resolve=False) or []]
    values, groups, partial = set[str](), {}, set[str]()
    for config_path, package, content in _own_files(job, overrides):
        group, _, choice = config_path.rpartition("/")
        # A file such as hardware/mine.yaml describes the hardware whole, for every recipe; data may lack its source.
        is_whole = group not in ("", "recipe") and (package != "data" or not content.keys().isdisjoint(SOURCES))
        if is_whole:
            groups[package] = choice
        else:
            values.update(_flat(content, package))
            partial.add(package)
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_delete():
            continue
        _require_one_choice(override.key_or_group, override.value())
        if override.key_or_group in partial:
            continue
        if override.key_or_group in job.runtime.choices:
            groups[override.key_or_group] = str(job.runtime.choices[override.key_or_group])
        else:
            values.update(_flat(override.value(), override.key_or_group))
    groups.pop("recipe", None)
    return Given(frozenset(values), groups, job.mode == RunMode.MULTIRUN)


def _require_one_choice(name: str, value: object) -> None:
    """Refuse a list of choices of a group, of which the last would overwrite the others; trackers add up."""
    is_list = isinstance(value, list) and name != "tracking" and bool(group_choices(name))
    rule = f"takes one choice; to run each, begin with -m and leave out the brackets, as in -m {name}=A,B"
    require(not is_list, name, value, rule)


def _own_files(job: Any, overrides: list[str]) -> Iterator[tuple[str, str, dict[Any, Any]]]:
    """Yield the YAML files of the user's folders that take part in a job: name, section and settings."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    sources = job.runtime.config_sources
    folders = [Path(one.path) for one in sources if one.provider not in OUR_PROVIDERS and one.schema == "file"]
    if not folders:
        return
    name = job.job.config_name
    defaults = GlobalHydra.instance().config_loader().compute_defaults_list(name, overrides, RunMode.RUN)
    for part in defaults.defaults:
        file = next((path for folder in folders if (path := folder / f"{part.config_path}.yaml").is_file()), None)
        if file is not None:
            content = OmegaConf.to_container(OmegaConf.load(file))
            assert isinstance(content, dict)
            content.pop("defaults", None)
            yield str(part.config_path), part.package or "", content


def _flat(value: Any, name: str) -> Iterator[str]:
    """Yield the dotted name of every leaf of nested mappings."""
    if not isinstance(value, dict):
        yield name
        return
    for key, one in value.items():
        yield from _flat(one, f"{name}.{key}".removeprefix("."))


def stand_in_path(data: Any) -> None:
    """Give a source that needs a path the path PATH, if it has none: the help of a recipe needs no file."""
    if data.source in (DataSource.text, DataSource.streams) and not data.mixture:
        data.path = data.path or "PATH"


def choose_source(data: Any, given: Given) -> None:
    """Set `data.source` to that of `data.path`, if the user gave a path and neither user nor recipe chose a source.

    A folder with a manifest holds the streams of `+recipe=collect`; any other path is text.

    Args:
        data: the composed section; its source may change.
        given: the settings that the user gave.
    """
    if "data.path" not in given.values or data.path is None or given.chose_source():
        return
    if data.source is DataSource.stdlib:
        data.source = DataSource.streams if (Path(data.path) / MANIFEST).is_file() else DataSource.text
