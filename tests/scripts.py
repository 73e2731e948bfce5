"""The scripts of the repository as modules; the folder is no package."""

import importlib.util
import sys
from types import ModuleType

from tests.command import ROOT


def load_script(name: str) -> ModuleType:
    """Return scripts/NAME.py, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module
