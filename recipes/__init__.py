"""The programs. `task` in conf/recipe/NAME.yaml names a module of this package; nothing lists them.

A task with a dot, such as `my_package.my_program`, names a module of the user's own on Python's search path.

A recipe defines

- `run(session)`: the program;
- `reads(config)`: the settings that it reads with this configuration; another setting that a user gives is refused;
- `check(config)`, optional: refuse settings before anything is opened;
- `PROCESSES`, optional: "one" (default); "any" if a launcher may start several processes; "led" if several may share
  the backbone's experts while rank 0 runs the program; "none" if the program needs no torch;
- `FOLDER`, optional: a `FolderUse`, its use of `output_dir` (default `run`), which is locked before `run` is called.
"""

from __future__ import annotations

import gc
import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mtptrain.config import RunConfig, did_you_mean
from mtptrain.errors import UserError


def _import(name: str) -> Any:
    """Import a module; with the first, which brings PyTorch, without garbage collections.

    Each would visit the million objects that imports make: a start takes a quarter less time. They stay, so later
    collections need not visit them either. A program that has imported PyTorch before may have garbage of its own.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return import_module(name)
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def find_recipe(task: str) -> Any:
    """Return the module that a task names: one of this package or, by a name with a dot, one of the user's.

    Raises:
        UserError: no module has this name, or the user's module is no program.
    """
    if "." in task:
        return _find_own(task)
    name = f"{__name__}.{task}"
    module = _import(name) if task.isidentifier() and find_spec(name) else None
    if not hasattr(module, "run"):
        names = [one.name for one in pkgutil.iter_modules(__path__)]
        raise UserError(
            f"task={task}: there is no such program{did_you_mean(task, names)}; leave it to +recipe=NAME, see --help"
        )
    return module


def _find_own(task: str) -> Any:
    """Return a module of the user's; errors of its own code keep their traceback."""
    try:
        is_there = all(part.isidentifier() for part in task.split(".")) and find_spec(task) is not None
    except ModuleNotFoundError:  # of a package in the name
        is_there = False
    if not is_there:
        raise UserError(
            f"task={task}: there is no such module on Python's search path; start in the folder that holds it with "
            "python -m mtptrain, or set PYTHONPATH"
        )
    module = import_module(task)
    missing = [name for name in ("run", "reads") if not hasattr(module, name)]
    if missing:
        raise UserError(f"task={task}: the module has no function {' and no '.join(missing)}; see CONTRIBUTING.md")
    return module


def tasks_that_read(setting: str, config: RunConfig) -> list[str]:
    """Return the tasks that would read a setting with this configuration."""
    modules = [import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    recipes = {module.__name__.rpartition(".")[2]: module for module in modules if hasattr(module, "reads")}
    return sorted(task for task, recipe in recipes.items() if setting in recipe.reads(config))
