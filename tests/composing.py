"""Compose Hydra's configurations at less cost: what depends on the chosen files alone is kept for all tests."""

import copy
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig

_LISTS: dict[str, DefaultsList] = {}
_COMPOSED: dict[str, bytes] = {}  # pickled, because that copies them in a third of the time of a deep copy
_list_defaults, _compose, _choose_mode = (
    config_loader_impl.create_defaults_list,
    ConfigLoaderImpl._compose_config_from_defaults_list,
    Hydra.get_mode,
)


def _is_kept(repo: Any) -> bool:
    """Return whether all files belong to packages; those of a test's own folder may change."""
    return all(source.scheme() != "file" for source in repo.get_sources())


def _defaults(repo: Any, config_name: Any, overrides_list: Any, **options: Any) -> DefaultsList:
    """Return the list of files; it depends on the overrides of groups only."""
    if not _is_kept(repo):
        return _list_defaults(repo, config_name, overrides_list, **options)
    chosen = Overrides(repo=repo, overrides_list=overrides_list)
    values, chosen.config_overrides = chosen.config_overrides, []
    name = repr((config_name, options, chosen))
    if name not in _LISTS:
        _LISTS[name] = _list_defaults(repo, config_name, overrides_list, **options)
    return replace(_LISTS[name], config_overrides=values)


def _composed(loader: Any, defaults: Any, repo: Any) -> DictConfig:
    """Return the merged files without the values of the command line."""
    if not _is_kept(repo):
        return _compose(loader, defaults, repo)
    name = repr(defaults)
    if name not in _COMPOSED:
        _COMPOSED[name] = pickle.dumps(_compose(loader, defaults, repo))
    composed: DictConfig = pickle.loads(_COMPOSED[name])
    return composed


def _open(repo: CachingConfigRepository, delegate: Any) -> None:
    """Initialise without the deep copy of all sources: another search path gets a list of its own."""
    repo.delegate, repo.cache = copy.copy(delegate), {}


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Return the mode of a command without composing it for the sake of `hydra.mode` in a file."""
    chosen = {"-m", "--multirun"} & set(sys.argv) or any("hydra.mode" in one for one in overrides)
    return _choose_mode(hydra, config_name, overrides) if chosen else RunMode.RUN


@contextmanager
def composing_once() -> Iterator[None]:
    """Keep Hydra from reading the same files again, and from composing a configuration twice."""
    with (
        patch.object(Hydra, "get_mode", _mode),
        patch.object(CachingConfigRepository, "__init__", _open),
        patch.object(config_loader_impl, "create_defaults_list", _defaults),
        patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", _composed),
    ):
        yield
