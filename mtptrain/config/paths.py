"""The user's home folder, `~`, at the beginning of the settings that hold paths; the folder of a run without one."""

from __future__ import annotations

import re
import time
from os.path import expanduser
from pathlib import Path
from typing import Any
from uuid import uuid4

from mtptrain.config.rules import require

PATHS = (
    "output_dir",
    "checkpoint",
    "checkpoints",
    "path",
    "prompts",
    "backbone.path",
    "backbone.grow_from",
    "data.path",
    "data.chat_template",
    "data.cache_dir",
    "on_policy.path",
    "on_policy.prompts",
    "mtp.init",
    "evaluation.traces",
    "model.path",
    "plan.evaluation",
)


def expand_home(config: Any) -> None:
    """Replace `~` in the paths of a `RunConfig`, those of the sources of a mixture among them.

    Raises:
        UserError: a path is empty, as from a variable of the shell that is not set.
    """
    for name in PATHS:
        *sections, setting = name.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        if section is not None:
            require(getattr(section, setting) != "", name, "", "is empty; give a path, or leave the setting out")
            setattr(section, setting, _expanded(getattr(section, setting)))
    for source in config.data.mixture:
        source.path = _expanded(source.path)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return expanduser(value) if isinstance(value, str) else value


def expand_argument(argument: str) -> str:
    """Replace an unquoted `~/` of a command-line argument: neither a shell nor Hydra reads `data.path=~/a.jsonl`."""
    home = expanduser("~")
    return re.sub(r"(?<=[=\[,:])~(?=/)", lambda _: home, argument)


def default_output_dir(task: str) -> Path:
    """Return a new folder for a run without `output_dir`.

    The random end of its name keeps runs apart that start in the same second, also on other machines.
    """
    return Path("outputs") / task / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{uuid4().hex[:8]}"
