"""Work that the workers of pytest-xdist share: the first that needs it does it, the others wait and read its folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder that `build` filled, once for all workers; tests must not write into it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    whole = folder / ".whole"
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            folder.mkdir()
            build(folder)
            whole.touch()
    return folder
