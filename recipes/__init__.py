"""The programs. `task` in conf/recipe/NAME.yaml names a module of this package; nothing lists them.

A recipe defines

- `run(session)`: the program;
- `reads(config)`: the settings that it reads with this configuration; another setting that a user gives is refused;
- `check(config)`, optional: refuse settings before anything is opened;
- `PROCESSES`, optional: "one" (default); "any" if a launcher may start several processes; "led" if several may share
  the backbone's experts while rank 0 runs the program; "none" if the program needs no torch;
- `FOLDER`, optional: a `FolderUse`, its use of `output_dir` (default `run`), which is locked before `run` is called.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mtptrain.config import RunConfig, did_you_mean
from mtptrain.errors import UserError


def find_recipe(task: str) -> Any:
    """Return the module of this package that a task names.

    Raises:
        UserError: no module has this name.
    """
    name = f"{__name__}.{task}"
    module = import_module(name) if task.isidentifier() and find_spec(name) else None
    if not hasattr(module, "run"):
        names = [one.name for one in pkgutil.iter_modules(__path__)]
        raise UserError(
            f"task={task}: there is no such program{did_you_mean(task, names)}; leave it to +recipe=NAME, see --help"
        )
    return module


def tasks_that_read(setting: str, config: RunConfig) -> list[str]:
    """Return the tasks that would read a setting with this configuration."""
    modules = [import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    recipes = {module.__name__.rpartition(".")[2]: module for module in modules if hasattr(module, "reads")}
    return sorted(task for task, recipe in recipes.items() if setting in recipe.reads(config))
