"""Packages that are not installed, so that a server's source can be imported without them."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Nothing(type):
    """A class whose attributes are such classes, to inherit from, to call and to decorate with."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing(name)


def nothing(name: str) -> Any:
    """Return a class that takes everything and does nothing; as a decorator it returns what it decorates."""

    def call(self: object, *arguments: Any, **options: Any) -> Any:
        is_decorator = len(arguments) == 1 and not options and callable(arguments[0])
        return arguments[0] if is_decorator else self

    members = {
        "__init__": lambda self, *_, **__: None,
        "__init_subclass__": classmethod(lambda cls, **_: None),
        "__class_getitem__": classmethod(lambda cls, _: cls),
        "__getattr__": lambda self, part: nothing(part),
        "__call__": call,
    }
    return _Nothing(name, (), members)


class _Module(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing(name)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that answers for packages and modules with nothing in them.

    Args:
        names: dotted names; modules below them are covered too.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return a spec for a module of `names`."""
        covered = any(f"{name}.".startswith(f"{one}.") for one in self.names)
        return ModuleSpec(name, self, is_package=True) if covered else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module whose every attribute exists."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


def install(names: Sequence[str]) -> None:
    """Let imports find nothing in place of these modules, installed or not."""
    sys.meta_path.insert(0, Absent(names))
