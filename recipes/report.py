"""`+recipe=report`: draw the report of an old evaluation again; no model is loaded.

python -m mtptrain +recipe=report path=outputs/distill/RUN
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mtptrain.config import RunConfig
from mtptrain.config.reads import ALWAYS, Settings
from mtptrain.errors import UserError
from mtptrain.evaluation.report.page import REPORT_FILE, write_report
from mtptrain.evaluation.report.tables import print_summary
from mtptrain.evaluation.result import read_evaluation
from mtptrain.recipes.session import Session
from mtptrain.run.folder import FolderUse
from mtptrain.run.storage import disk_full_reason

FOLDER = FolderUse.own
PROCESSES = "none"


def reads(config: RunConfig) -> Settings:
    """Return the settings that a report reads."""
    return ALWAYS | {"path"}


def check(config: RunConfig) -> None:
    """Refuse a report without an evaluation."""
    if config.path is None:
        raise UserError("path=null: report needs an evaluation.json or the folder of its run; set path=RUN")


def claim_report(session: Session) -> Path:
    """Return the path of the new report, in `output_dir` or beside the evaluation, after locking its folder.

    Raises:
        UserError: the file exists and `overwrite` is false, another run is writing the folder, or it cannot be written.
    """
    evaluation = Path(str(session.config.path))
    if session.config.output_dir is None:
        folder = evaluation if evaluation.is_dir() else evaluation.parent
        setting, way_out = "path", "set output_dir to another folder"
    else:
        folder = session.folder.path
        setting, way_out = "output_dir", "choose another folder"
    report = folder / REPORT_FILE
    try:
        session.folder.lock.take(folder, setting)
    except OSError as error:
        raise cannot_write(session, report, error) from None
    if report.exists() and not session.config.overwrite:
        raise UserError(f"{setting}={folder}: {report} exists; {way_out}, or set overwrite=true to replace it")
    return report


def cannot_write(session: Session, report: Path, error: OSError) -> Exception:
    """Return the error to raise if a report cannot be written."""
    if disk_full_reason(error):
        return error
    where, reason = f"path={session.config.path}", error.strerror
    return UserError(f"{where}: {report} cannot be written ({reason}); set output_dir to a folder of yours")


def run(session: Session) -> None:
    """Write report.html and print the summary."""
    evaluation = read_evaluation(Path(str(session.config.path)), "path")
    report = claim_report(session)
    try:
        write_report(evaluation, report)
    except OSError as error:
        raise cannot_write(session, report, error) from None
    print_summary(evaluation, Console())
    session.folder.print_status(f"wrote {report}")
