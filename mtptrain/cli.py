"""The command line: compose and check the configuration, run the recipe, report a user's mistake in one line."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

import mtptrain
from mtptrain.config import RunConfig, register
from mtptrain.config.arguments import completion_line, is_first_word, read_arguments
from mtptrain.config.given import Given, choose_source, given_settings, stand_in_path
from mtptrain.config.reads import Settings, section_of
from mtptrain.config.rules import types_of
from mtptrain.config.run import run_schema
from mtptrain.config.sweep import check_command, first_job, job_arguments
from mtptrain.config.typos import composition_message, group_choices, no_such_setting, wrong_value
from mtptrain.config.unread import check_given, check_sweep
from mtptrain.config.verbosity import set_verbosity
from mtptrain.errors import INTERRUPTED, PREEMPTED, USER_MISTAKE, Preempted, UserError
from mtptrain.help import print_recipe_help, register_help, wrapping_lines
from mtptrain.recipes.sweep import Sweep
from mtptrain.run.lost import LostProcessError, UnreachableError, lost_process_error, naming_lost_processes
from mtptrain.run.memory import out_of_memory_reason
from mtptrain.run.storage import disk_full_reason

if TYPE_CHECKING:
    from mtptrain.recipes.session import Session


LESS_MEMORY = "less is needed with a smaller train.batch_size, data.sequence_length or evaluation.batch_sizes"
PATIENCE_SECONDS = 10.0  # until rank 0 has printed a mistake that every process meets by itself


def stop(message: str, mistake: UserError | None = None) -> NoReturn:
    """Print one line and end with the exit code of a user's mistake; of several ranks that fail, one prints.

    Args:
        message: the line.
        mistake: the exception that ends the run; None before the processes meet.
    """
    distributed = sys.modules.get("mtptrain.run.distributed")  # it imports torch
    number = os.environ.get("RANK", "0")
    if number != "0" and isinstance(mistake, UnreachableError):  # the others cannot be asked
        is_printed = True
    elif distributed is None or not distributed.has_met():
        is_printed = number == "0"
        time.sleep(0 if is_printed else PATIENCE_SECONDS)  # a launcher ends rank 0 as soon as this process ends
    else:
        is_printed = distributed.prints_mistake(isinstance(mistake, LostProcessError))
    if is_printed:
        origin = "" if number == "0" else f"process {number} on {platform.node()}: "
        print(f"mtptrain: {origin}{' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(USER_MISTAKE)


def unknown_keys(values: dict[str, object], schema: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys, added with `+key=value`, that the schema does not have."""
    known = types_of(schema)
    unknown = []
    for key, value in values.items():
        if key not in known:
            unknown.append(prefix + key)
            continue
        section = section_of(known[key])
        if isinstance(value, dict) and section is not None:
            unknown.extend(unknown_keys(value, section, f"{prefix}{key}."))
    return unknown


def typed_config(composed: DictConfig, given: Given, is_help: bool = False) -> tuple[RunConfig, dict[str, object]]:
    """Return the typed configuration, and the same as plain values.

    Args:
        composed: by Hydra; interpolations are resolved in it, and its source of data may be chosen.
        given: the user's part of it.
        is_help: whether it is only to be described, so a missing path is no mistake.

    Raises:
        UserError: a key is unknown, a type is wrong or a value is out of range.
    """
    try:
        choose_source(composed.data, given)
        if is_help:
            stand_in_path(composed.data)
        values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:  # an interpolation of a missing key
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}; write a value") from None
    assert isinstance(values, dict)
    settings = {str(key): value for key, value in values.items()}
    if settings.get("task") in (None, "???"):
        raise UserError("no recipe is chosen; add +recipe=distill or begin with distill (--help lists all recipes)")
    unknown = unknown_keys(settings, RunConfig)
    if unknown:
        raise UserError(no_such_setting(unknown[0]))
    try:
        _resolve(composed, settings)
        config = OmegaConf.to_object(composed)
    except UserError:
        raise
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}=???: write a value") from None
    except OmegaConfBaseException as error:
        raise UserError(wrong_value(error)) from None
    assert isinstance(config, RunConfig)
    return config, settings


def _resolve(composed: DictConfig, settings: dict[str, object]) -> None:
    """Replace interpolations by their values, which checks the types of interpolated lists and mappings."""
    try:
        OmegaConf.resolve(composed)
    except ValidationError:  # without the name of the setting
        OmegaConf.merge(run_schema(), settings)
        raise


def run_task(
    config: RunConfig,
    settings: dict[str, object],
    given: Given,
    job_folder: Path | None,
    prepare: Callable[[Session], object] = lambda session: None,
) -> None:
    """Check the settings, open the run's folder and run the recipe's program.

    Args:
        config: of the run.
        settings: the same as plain values.
        given: the user's part of it.
        job_folder: of a job of a sweep; None outside a sweep.
        prepare: called with the session before the first check of its inputs.
    """
    from mtptrain.recipes import find_recipe, tasks_that_read
    from mtptrain.recipes.session import Session
    from mtptrain.run.folder import FolderUse, open_run_folder
    from mtptrain.run.progress import waiting

    with waiting("importing PyTorch"):
        recipe = find_recipe(config.task)
    reads = recipe.reads(config)
    check_given(given, config, reads, lambda name: tasks_that_read(name, config))
    getattr(recipe, "check", lambda _: None)(config)
    processes = getattr(recipe, "PROCESSES", "one")
    use: FolderUse = getattr(recipe, "FOLDER", FolderUse.run)
    if processes == "none":
        session = Session(config, open_run_folder(config, settings, job_folder, use))
        with closing(session.folder.lock):
            prepare(session)
            run_recipe(recipe, session, reads)
        return
    from mtptrain.kernels.dispatch import requested
    from mtptrain.recipes.lead import lead
    from mtptrain.run.distributed import join, leave, on_rank0

    try:
        requested()
    except ValueError as error:  # kernels import nothing of mtptrain, not even UserError
        raise UserError(str(error)) from None
    join(config, processes)
    session = Session(config, on_rank0(lambda: open_run_folder(config, settings, job_folder, use)))
    with closing(session.folder.lock):
        prepare(session)
        if processes == "led":
            lead(session, lambda: run_recipe(recipe, session, reads))
        else:
            run_recipe(recipe, session, reads)
    leave()


def run_recipe(recipe: Any, session: Session, reads: Settings) -> None:
    """Check what a recipe reads, lock its folder and run it; after a signal or without room, say how to go on.

    Raises:
        Preempted: a signal ended the run.
        UserError: the user made a mistake, or memory or disk are full.
    """
    from mtptrain.run.preemption import Terminated, terminable

    if getattr(recipe, "PROCESSES", "one") == "none":
        session.folder.claim()
    else:
        from mtptrain.recipes.inputs import check_inputs
        from mtptrain.run.distributed import on_rank0

        check_inputs(session, reads)
        on_rank0(session.folder.claim)
    try:
        with terminable():
            recipe.run(session)
    except Preempted as ending:
        way_on = f"continue with resume=auto output_dir={session.folder.path}"
        raise Preempted(f"{ending}; {way_on}", ending.is_by_user) from None
    except KeyboardInterrupt as ending:
        raise Preempted(session.folder.describe_rest(), not isinstance(ending, Terminated)) from None
    except UserError:
        raise
    except Exception as error:
        rest = session.folder.describe_rest()
        lost = lost_process_error(error, session.config.distributed_timeout, rest)
        if lost is not None:
            raise lost from error
        too_large = out_of_memory_reason(error)
        if too_large is not None:
            logging.getLogger("mtptrain.cli").debug("out of memory", exc_info=error)
            raise UserError(f"out of memory ({too_large}); {LESS_MEMORY}; {rest}") from error
        reason = disk_full_reason(error)
        if reason is None:
            raise
        where = f"output_dir={session.folder.path}"
        raise UserError(f"{where}: {reason} ({error}); free some room; {rest}") from error


def leave_pipe() -> NoReturn:
    """End the program without a word: the reader of its output, such as `head`, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(1) from None


def run_job(composed: DictConfig, job_folder: Path | None = None, shows_help: bool = False) -> None:
    """Check and run one composed configuration, or describe its recipe; a job of a sweep has a folder."""
    try:
        given = given_settings(HydraConfig.get())
        logging.getLogger("mtptrain.cli").debug("given settings: %s", ", ".join(sorted(given.values)))
        config, settings = typed_config(composed, given, is_help=shows_help)
        if shows_help:
            print_recipe_help(str(HydraConfig.get().runtime.choices["recipe"]), config)
            return
        with naming_lost_processes(config.distributed_timeout):
            run_task(config, settings, given, job_folder)
    except UserError as error:
        stop(str(error), error)
    except Preempted as ending:
        from mtptrain.run.distributed import another_rank_failed

        if os.environ.get("RANK", "0") == "0" and not another_rank_failed():
            print(f"mtptrain: {'interrupted' if ending.is_by_user else 'preempted'}: {ending}", file=sys.stderr)
        raise SystemExit(INTERRUPTED if ending.is_by_user else PREEMPTED) from None
    except BrokenPipeError:  # Hydra would print a traceback
        leave_pipe()
    except KeyboardInterrupt:  # before there is a folder
        print("mtptrain: interrupted: nothing was written; start it again", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def sweep_jobs(command: Sequence[str]) -> Iterator[tuple[Given, RunConfig, Settings]]:
    """Yield the user's settings, the configuration and the settings to read of every job that can be composed."""
    from mtptrain.recipes import find_recipe

    loader, name = GlobalHydra.instance().config_loader(), HydraConfig.get().job.config_name
    for arguments in job_arguments(command):
        try:
            composed = loader.load_configuration(name, arguments, RunMode.RUN)
            given = replace(given_settings(composed.hydra), is_sweep=True)
            with open_dict(composed):
                del composed["hydra"]
            config, _ = typed_config(composed, given)
            yield given, config, find_recipe(config.task).reads(config)
        except (UserError, HydraException, OmegaConfBaseException):  # the job itself will say so
            continue


def open_sweep(sweep: Sweep, composed: DictConfig) -> None:
    """Set the folder of a sweep; end with a line if it holds another one, or if no job reads a given setting."""
    from mtptrain.recipes import tasks_that_read

    if sweep.folder is not None:
        return
    try:
        sweep.open(composed)
        check_sweep(sweep_jobs(sweep.command), tasks_that_read)
    except UserError as error:
        stop(str(error), error)


def main() -> None:
    """Run `python -m mtptrain` or the `mtptrain` script."""
    register()
    register_help()
    line = read_arguments(sys.argv[1:])
    if line.wants_version:  # Hydra would print its own version
        print(f"mtptrain {mtptrain.__version__}")
        return
    if "COMP_LINE" in os.environ and is_first_word(os.environ["COMP_LINE"]):
        print(" ".join(group_choices("recipe")))  # the shell picks those that fit
        return
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = completion_line(os.environ["COMP_LINE"])
    set_verbosity(line.verbosity)
    sys.argv[1:] = first_job(line.words) if line.wants_help else line.words
    try:
        check_command(sys.argv[1:])
    except UserError as error:
        stop(str(error))
    errors, sweep = io.StringIO(), Sweep(sys.argv)

    @hydra.main(version_base="1.3", config_path="pkg://mtptrain.conf", config_name="config")
    def job(composed: DictConfig) -> None:
        sys.stderr = sys.__stderr__
        errors.seek(0)
        errors.truncate()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            open_sweep(sweep, composed)
            sweep.run(lambda folder: run_job(composed, folder))
        else:
            run_job(composed, shows_help=line.wants_help)

    # Hydra prints its own errors and ends with code 1: capture them until the job starts and print them as one line.
    sys.stderr = errors
    try:
        with wrapping_lines() if "--help" in line.options else nullcontext():
            job()
    except SystemExit as ending:
        sys.stderr = sys.__stderr__
        if ending.code == 1 and errors.getvalue():
            message = composition_message(errors.getvalue(), ending.__context__, sys.argv[1:])
            stop(message.removeprefix("+recipe=") if line.is_short else message)
        if ending.code == USER_MISTAKE and errors.getvalue():  # argparse uses the same exit code
            reason = errors.getvalue().splitlines()[-1].partition("error: ")[2]
            stop(f"{reason}; a setting is written name=value, without dashes; see --help")
        raise
    except BrokenPipeError:
        leave_pipe()
    finally:
        sys.stderr = sys.__stderr__
        sweep.finish()
    if sweep.exit_code:
        raise SystemExit(sweep.exit_code)
