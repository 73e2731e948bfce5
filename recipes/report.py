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
from mtptrain.run.storage import disk_full_reason

PROCESSES = "none"


def reads(config: RunConfig) -> Settings:
    """Return the settings that a report reads."""
    return ALWAYS | {"path"}


def check(config: RunConfig) -> None:
    """Refuse a report without an evaluation."""
    if config.path is None:
        raise UserError("path=null: report needs an evaluation.json or the folder of its run; set path=RUN")


def report_path(session: Session) -> Path:
    """Return the path of the new report: in `output_dir`, or beside the evaluation.

    Raises:
        UserError: the file exists.
    """
    evaluation = Path(str(session.config.path))
    if session.config.output_dir is None:
        folder = evaluation if evaluation.is_dir() else evaluation.parent
        setting, way_out = f"path={evaluation}", "set output_dir to another folder"
    else:
        folder = session.folder.path
        setting, way_out = f"output_dir={folder}", "choose another folder"
    report = folder / REPORT_FILE
    if report.exists():
        raise UserError(f"{setting}: {report} exists and is not overwritten; {way_out}, or delete it")
    return report


def run(session: Session) -> None:
    """Write report.html and print the summary."""
    evaluation = read_evaluation(Path(str(session.config.path)), "path")
    report = report_path(session)
    try:
        write_report(evaluation, report)
    except OSError as error:
        if disk_full_reason(error):
            raise
        raise UserError(
            f"path={session.config.path}: {report} cannot be written ({error.strerror}); set output_dir to a folder of "
            "yours"
        ) from None
    print_summary(evaluation, Console())
    session.folder.print_status(f"wrote {report}")
