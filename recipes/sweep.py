"""The jobs of a sweep (`-m`): a folder for each, and at the end one table and one page over them all."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mtptrain.config.sweep import job_name, varied_settings
from mtptrain.config.verbosity import print_status
from mtptrain.errors import CHECK_FAILED, INTERRUPTED, PREEMPTED, Preempted, UserError

if TYPE_CHECKING:  # a single run needs none of it
    from omegaconf import DictConfig

    from mtptrain.evaluation.sweep import SweepJob

CRASHED = 1  # exit code of an error that is no user's mistake


class Sweep:
    """The jobs of one command, so far; a command without `-m` has none.

    A job that fails is listed, and the next one runs. Of several processes no job can follow one that failed, since not
    all of them may know of it.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.folder: Path | None = None
        self.jobs: list[SweepJob] = []
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.exit_code = 0  # that of the first job that failed
        self.keeps_earlier = True

    def open(self, composed: DictConfig) -> None:
        """Set the folder, before the first job, and refuse one that holds another sweep.

        Raises:
            UserError: it does, and neither `resume=auto` adds to that sweep nor `overwrite=true` replaces it.
        """
        from hydra.core.hydra_config import HydraConfig

        from mtptrain.evaluation.sweep import SWEEP_FILE, read_sweep

        folder = _sweep_folder(composed, Path(HydraConfig.get().runtime.output_dir))
        self.keeps_earlier = not composed.overwrite
        if self.keeps_earlier and (folder / SWEEP_FILE).exists():
            if composed.resume != "auto":
                raise UserError(
                    f"output_dir={folder}: already holds {SWEEP_FILE}; choose another folder, add to its jobs with "
                    "resume=auto, or set overwrite=true to replace it"
                )
            read_sweep(folder / SWEEP_FILE, "output_dir")
        self.folder = folder

    def run(self, start: Callable[[Path], None]) -> None:
        """Run a job in its folder, and keep how it ended; call `open` first.

        Args:
            start: runs it, given its folder.

        Raises:
            SystemExit: a signal ended the job, or it failed in one of several processes.
        """
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        job = HydraConfig.get()
        varied = varied_settings([str(one) for one in OmegaConf.to_container(job.overrides.task) or []], self.command)
        name = job_name(varied, int(job.job.num))
        assert self.folder is not None
        _print_status(f"job {job.job.num}: {self.folder / name}")
        begun, code, reason = time.monotonic(), 0, None
        try:
            start(self.folder / name)
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else CRASHED
            reason = _reason(ending)
        except Exception as error:  # a bug in one job does not cost the others
            traceback.print_exc()
            code, reason = CRASHED, f"{type(error).__name__}: {error}"
        self._keep(varied, name, code, reason, time.monotonic() - begun)
        if code in (PREEMPTED, INTERRUPTED) or (code and int(os.environ.get("WORLD_SIZE", "1")) > 1):
            raise SystemExit(code)

    def _keep(self, varied: dict[str, str], name: str, code: int, reason: str | None, seconds: float) -> None:
        from mtptrain.evaluation.sweep import JobOutcome, SweepJob

        outcomes = {0: JobOutcome.done, CHECK_FAILED: JobOutcome.uncertified}
        outcomes |= dict.fromkeys((PREEMPTED, INTERRUPTED), JobOutcome.stopped)
        outcome = outcomes.get(code, JobOutcome.failed)
        self.exit_code = self.exit_code or code
        self.jobs.append(
            SweepJob(settings=varied, folder=name, outcome=outcome, exit_code=code, reason=reason, seconds=seconds)
        )

    def finish(self) -> None:
        """Write sweep.json and its page, and print the table; do nothing without jobs and on ranks other than 0."""
        if self.folder is None or not self.jobs or os.environ.get("RANK", "0") != "0":
            return
        from mtptrain.evaluation.report.sweep_page import SWEEP_PAGE, print_sweep, write_sweep_page
        from mtptrain.evaluation.sweep import SWEEP_FILE, SWEEP_SCHEMA, SweepResult, write_sweep
        from mtptrain.run.provenance import git_commit
        from mtptrain.run.tables import open_console

        result = SweepResult(
            schema=SWEEP_SCHEMA,
            command=["python", "-m", "mtptrain", *self.command[1:]],
            started=self.started,
            git_commit=git_commit(),
            jobs=[*self._earlier_jobs(), *self.jobs],
        )
        try:
            write_sweep(self.folder / SWEEP_FILE, result)
            write_sweep_page(result, self.folder, self.folder / SWEEP_PAGE)
        except OSError as error:  # the jobs' own results are written
            _print_status(f"{self.folder / SWEEP_FILE} cannot be written ({error.strerror})")
        print_sweep(result, self.folder, open_console())
        _print_status(f"wrote {self.folder / SWEEP_FILE} and {self.folder / SWEEP_PAGE}")

    def _earlier_jobs(self) -> list[SweepJob]:
        """Return the jobs of the sweep.json in the folder that did not run again, also those of a sweep beside this."""
        from mtptrain.evaluation.sweep import SWEEP_FILE, read_sweep

        assert self.folder is not None
        path, own = self.folder / SWEEP_FILE, {job.folder for job in self.jobs}
        if not self.keeps_earlier or not path.exists():
            return []
        return [job for job in read_sweep(path, "output_dir").jobs if job.folder not in own]


def _reason(ending: SystemExit) -> str | None:
    """Return the line of the user's mistake or of the signal behind an exit; None if the result says what is wrong."""
    cause = ending.__context__
    while cause is not None and not isinstance(cause, UserError | Preempted):
        cause = cause.__context__
    return None if cause is None else " ".join(str(cause).split())


def _sweep_folder(composed: DictConfig, made: Path) -> Path:
    """Return the folder of a sweep as the user wrote it; of one without `output_dir`, the folder that Hydra made."""
    if composed.output_dir:
        return Path(expanduser(str(composed.output_dir)))
    return made.relative_to(Path.cwd()) if made.is_relative_to(Path.cwd()) else made


def _print_status(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print_status(line)
