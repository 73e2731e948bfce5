"""The command line: compose and check the configuration, run the recipe, report a user's mistake in one line."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import closing
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn, get_args, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtptrain.config import RunConfig, register
from mtptrain.config.paths import expand_argument
from mtptrain.errors import Preempted, UserError
from mtptrain.help import register_help
from mtptrain.run.storage import disk_full_reason

RENAMED = {"decoding.stop_below": "decoding.min_confidence"}
PLAN_FLAG, PLAN_SETTING = "--plan", "collect.plan_only=true"  # Hydra accepts no flags of other programs
USER_MISTAKE, PREEMPTED = 2, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits.h: try again later


def stop(message: str) -> NoReturn:
    """Print one line and end with the exit code of a user's mistake; if all ranks fail, only rank 0 prints."""
    message += "".join(f"; {old} is now called {new}" for old, new in RENAMED.items() if old in message)
    distributed = sys.modules.get("mtptrain.run.distributed")  # it imports torch
    number = os.environ.get("RANK", "0")
    if number == "0":
        print(f"mtptrain: {' '.join(message.split())}", file=sys.stderr)
        if distributed is not None:
            distributed.announce_failure()
    elif distributed is not None and not distributed.rank0_failed_too():
        print(f"mtptrain: process {number}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(USER_MISTAKE)


def unknown_keys(values: dict[str, object], schema: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys, added with `+key=value`, that the schema does not have."""
    known = get_type_hints(schema)
    unknown = []
    for key, value in values.items():
        if key not in known:
            unknown.append(prefix + key)
            continue
        section = next((part for part in (known[key], *get_args(known[key])) if is_dataclass(part)), None)
        if isinstance(value, dict) and section is not None:
            unknown.extend(unknown_keys(value, section, f"{prefix}{key}."))
    return unknown


def typed_config(composed: DictConfig) -> tuple[RunConfig, dict[str, object]]:
    """Return the typed configuration, and the same as plain values.

    Raises:
        UserError: a key is unknown, a type is wrong or a value is out of range.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:  # an interpolation of a missing key
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}; write a value") from None
    assert isinstance(values, dict)
    settings = {str(key): value for key, value in values.items()}
    if settings.get("task") in (None, "???"):
        raise UserError("no recipe is chosen; add +recipe=distill (or another recipe that --help lists); see --help")
    unknown = unknown_keys(settings, RunConfig)
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such setting; `--cfg job` lists all of them")
    schema = OmegaConf.structured(RunConfig)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except UserError:
        raise
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from None
    assert isinstance(config, RunConfig)
    return config, settings


def find_recipe(task: str) -> Any:
    """Return the module of `mtptrain.recipes` that a task names; `mtptrain/recipes/__init__.py` lists its attributes.

    Raises:
        UserError: no module has this name.
    """
    name = f"mtptrain.recipes.{task}"
    module = import_module(name) if task.isidentifier() and find_spec(name) else None
    if not hasattr(module, "run"):
        raise UserError(f"task={task}: there is no such program; leave it to +recipe=NAME, see --help")
    return module


def run_task(config: RunConfig, settings: dict[str, object], job_number: int | None) -> None:
    """Open the run's folder and run the recipe's program."""
    from mtptrain.recipes.session import Session
    from mtptrain.run.folder import open_run_folder

    recipe = find_recipe(config.task)
    getattr(recipe, "check", lambda _: None)(config)
    processes = getattr(recipe, "PROCESSES", "one")
    if processes == "none":
        session = Session(config, open_run_folder(config, settings, job_number))
        with closing(session.folder.lock):
            recipe.run(session)
        return
    from mtptrain.kernels.dispatch import requested
    from mtptrain.run.distributed import join, leave, on_rank0

    try:
        requested()
    except ValueError as error:  # kernels import nothing of mtptrain, not even UserError
        raise UserError(str(error)) from None
    join(config, is_shared=processes == "any")
    session = Session(config, on_rank0(lambda: open_run_folder(config, settings, job_number)))
    with closing(session.folder.lock):
        recipe.run(session)
    leave()


def run_job(composed: DictConfig, errors: io.StringIO) -> None:
    """Check and run one composed configuration."""
    sys.stderr = sys.__stderr__
    errors.seek(0)
    errors.truncate()
    hydra_config = HydraConfig.get()
    job_number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
    try:
        config, settings = typed_config(composed)
        run_task(config, settings, job_number)
    except UserError as error:
        stop(str(error))
    except Preempted as ending:
        if os.environ.get("RANK", "0") == "0":
            print(f"mtptrain: preempted: {ending}; continue with resume=auto", file=sys.stderr)
        raise SystemExit(PREEMPTED) from None
    except KeyboardInterrupt:
        print("mtptrain: interrupted; continue with the same output_dir and resume=auto", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        reason = disk_full_reason(error)
        if reason is None:
            raise
        stop(f"output_dir: {reason} ({error}); free some room and continue with the same output_dir and resume=auto")


def composition_message(text: str, cause: BaseException | None) -> str:
    """Return Hydra's error about a configuration on one line, without hints about Hydra itself.

    Args:
        text: the lines that Hydra printed.
        cause: the exception behind them.
    """
    if isinstance(cause, OverrideParseException):
        return f"{cause.override}: is not setting=value; an odd value needs 'setting=\"value\"'; see --help"
    lines = [line.strip() for line in text.splitlines()]
    if "Traceback (most recent call last):" in lines:  # the folder of a sweep cannot be created
        lines = [line for line in lines if re.match(r"\w+Error: ", line)][-1:]
    dropped = re.compile(r"HYDRA_FULL_ERROR|^full_key|^object_type|^reference_type|^Config search path|provider=|^\|")
    return "; ".join(line for line in lines if line and not dropped.search(line)) + "; see --help"


def main() -> None:
    """Run `python -m mtptrain` or the `mtptrain` script."""
    register()
    register_help()
    sys.argv = [PLAN_SETTING if argument == PLAN_FLAG else expand_argument(argument) for argument in sys.argv]
    errors = io.StringIO()

    @hydra.main(version_base="1.3", config_path="pkg://mtptrain.conf", config_name="config")
    def job(composed: DictConfig) -> None:
        run_job(composed, errors)

    # Hydra prints its own errors and ends with code 1: capture them until the job starts and print them as one line.
    sys.stderr = errors
    try:
        job()
    except SystemExit as ending:
        sys.stderr = sys.__stderr__
        if ending.code == 1 and errors.getvalue():
            stop(composition_message(errors.getvalue(), ending.__context__))
        if ending.code == USER_MISTAKE and errors.getvalue():  # argparse uses the same exit code
            reason = errors.getvalue().splitlines()[-1].partition("error: ")[2]
            stop(f"{reason}; options such as --config-dir go before the settings; see --help")
        raise
    finally:
        sys.stderr = sys.__stderr__
