"""Compose Hydra's configurations at less cost: what depends on the chosen files alone is kept for all tests."""

import copy
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import hydra._internal.utils
import hydra.core.utils
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

_LISTS: dict[str, DefaultsList] = {}
# Pickled, because that copies them in a third of the time of a deep copy.
_COMPOSED: dict[str, bytes] = {}
_FILES: dict[str, bytes] = {}
_load_file, _list_defaults, _compose, _choose_mode = (
    ConfigRepository.load_config,
    config_loader_impl.create_defaults_list,
    ConfigLoaderImpl._compose_config_from_defaults_list,
    Hydra.get_mode,
)


def _origin(repo: Any) -> str | None:
    """Return the packages that hold all files; None with a folder of a test's own, whose files may change."""
    paths = [f"{source.scheme()}://{source.path}" for source in repo.get_sources()]
    return None if any(path.startswith("file:") for path in paths) else " ".join(paths)


def _copied(value: Any) -> Any:
    """Return a deep copy; of Hydra's own section itself, since no callback changes it."""
    return value if value is HydraConfig.instance().cfg else pickle.loads(pickle.dumps(value))


def _loaded(repo: ConfigRepository, config_path: str) -> Any:
    """Return a file's content."""
    origin = _origin(repo)
    if origin is None:
        return _load_file(repo, config_path)
    name = f"{origin} {config_path}"
    if name not in _FILES:
        _FILES[name] = pickle.dumps(_load_file(repo, config_path))
    return pickle.loads(_FILES[name])


def _defaults(repo: Any, config_name: Any, overrides_list: Any, **options: Any) -> DefaultsList:
    """Return the list of files; it depends on the overrides of groups only."""
    origin = _origin(repo)
    if origin is None:
        return _list_defaults(repo, config_name, overrides_list, **options)
    chosen = Overrides(repo=repo, overrides_list=overrides_list)
    values, chosen.config_overrides = chosen.config_overrides, []
    name = repr((origin, config_name, options, chosen))
    if name not in _LISTS:
        _LISTS[name] = _list_defaults(repo, config_name, overrides_list, **options)
    return replace(_LISTS[name], config_overrides=values)


def _composed(loader: Any, defaults: Any, repo: Any) -> DictConfig:
    """Return the merged files without the values of the command line."""
    origin = _origin(repo)
    if origin is None:
        return _compose(loader, defaults, repo)
    name = repr((origin, defaults))
    if name not in _COMPOSED:
        _COMPOSED[name] = pickle.dumps(_compose(loader, defaults, repo))
    composed: DictConfig = pickle.loads(_COMPOSED[name])
    return composed


def _open(repo: CachingConfigRepository, delegate: Any) -> None:
    """Initialise without the deep copy of all sources: another search path gets a list of its own."""
    repo.delegate, repo.cache = copy.copy(delegate), {}


def _mode(program: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Return the mode of a command without composing it for the sake of `hydra.mode` in a file."""
    chosen = {"-m", "--multirun"} & set(sys.argv) or any("hydra.mode" in one for one in overrides)
    return _choose_mode(program, config_name, overrides) if chosen else RunMode.RUN


@contextmanager
def composing_once() -> Iterator[None]:
    """Keep Hydra from reading the same files again, and from composing a configuration twice."""
    with (
        patch.object(Hydra, "get_mode", _mode),
        patch.object(hydra._internal.utils, "is_under_debugger", bool),  # it reads the source of every frame
        patch.object(CachingConfigRepository, "__init__", _open),
        patch.object(ConfigRepository, "load_config", _loaded),
        patch.object(hydra.core.utils, "copy", SimpleNamespace(deepcopy=_copied)),
        patch.object(config_loader_impl, "create_defaults_list", _defaults),
        patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", _composed),
    ):
        yield
