"""`+recipe=report`: draw the page of an earlier evaluation, curve, comparison, sweep or training; no model is loaded.

python -m mtptrain +recipe=report path=outputs/distill/RUN
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mtptrain.config import RunConfig
from mtptrain.config.reads import ALWAYS, Settings
from mtptrain.config.rules import any_of
from mtptrain.errors import UserError
from mtptrain.evaluation.comparison_result import COMPARISON_FILE, read_comparison
from mtptrain.evaluation.curve import read_curve
from mtptrain.evaluation.report.comparison_page import COMPARISON_PAGE, print_result, write_comparison_page
from mtptrain.evaluation.report.curve_page import CURVE_PAGE, print_curve, write_curve_page
from mtptrain.evaluation.report.page import REPORT_FILE, write_report
from mtptrain.evaluation.report.sweep_page import SWEEP_PAGE, print_sweep, write_sweep_page
from mtptrain.evaluation.report.tables import print_summary
from mtptrain.evaluation.report.training_page import print_training, training_of, write_training_page
from mtptrain.evaluation.result import EVALUATION_FILE, read_evaluation
from mtptrain.evaluation.sweep import SWEEP_FILE, read_sweep
from mtptrain.recipes.session import Session
from mtptrain.run.folder import CURVE_FILE, FolderUse
from mtptrain.run.record import read_record
from mtptrain.run.storage import disk_full_reason
from mtptrain.run.tables import open_console
from mtptrain.run.tracking import METRICS_FILE

FOLDER = FolderUse.own
PROCESSES = "none"
WANTED = "an evaluation.json or the folder of its run, of a training, a curve, a comparison or a sweep"
RECORDS = (
    EVALUATION_FILE,
    CURVE_FILE,
    COMPARISON_FILE,
    SWEEP_FILE,
    METRICS_FILE,
)  # the first that a folder holds is drawn


@dataclass(frozen=True, slots=True)
class Page:
    """A page to be drawn.

    Attributes:
        name: of its file.
        write: writes it to a path.
        show: prints its tables.
        is_final: whether its figures are; those of a training that goes on are not, and its run keeps the folder.
    """

    name: str
    write: Callable[[Path], None]
    show: Callable[[Console], None]
    is_final: bool = True


def reads(config: RunConfig) -> Settings:
    """Return the settings that a report reads."""
    return ALWAYS | {"path", "overwrite"}


def check(config: RunConfig) -> None:
    """Refuse a report without an evaluation."""
    if config.path is None:
        raise UserError(f"path=null: report needs {WANTED}; set path=RUN")


def find_page(path: Path) -> Page:
    """Return the page of a run, a curve, a comparison or a sweep.

    Args:
        path: its folder, or the file that holds its figures.

    Raises:
        UserError: the file cannot be read.
    """
    file = path
    if path.is_dir():
        file = path / next((name for name in RECORDS if (path / name).exists()), "")
        if file == path:
            raise UserError(f"path={path}: holds no {any_of(RECORDS)}; give {WANTED}")
    kind = _kind(file)
    if kind == COMPARISON_FILE:
        comparison = read_comparison(file, "path")
        return Page(
            COMPARISON_PAGE,
            lambda page: write_comparison_page(comparison, page),
            lambda console: print_result(comparison, console),
        )
    if kind == CURVE_FILE:
        curve = read_curve(file, "path")
        return Page(CURVE_PAGE, lambda page: write_curve_page(curve, page), lambda console: print_curve(curve, console))
    if kind == SWEEP_FILE:
        sweep = read_sweep(file, "path")
        return Page(
            SWEEP_PAGE,
            lambda page: write_sweep_page(sweep, file.parent, page),
            lambda console: print_sweep(sweep, file.parent, console),
        )
    if kind == METRICS_FILE:
        return _training_page(file)
    evaluation = read_evaluation(path, "path")
    training = training_of(evaluation, file.parent)
    return Page(
        REPORT_FILE,
        lambda page: write_report(evaluation, page, training),
        lambda console: print_summary(evaluation, console),
    )


def _training_page(file: Path) -> Page:
    try:
        record = read_record(file.parent)
    except OSError as error:
        raise UserError(f"path={file}: cannot be read ({error.strerror})") from None
    if record is None:
        raise UserError(f"path={file}: holds no row yet; draw it after the first train.log_every steps")
    return Page(
        REPORT_FILE,
        lambda page: write_training_page(record, page),
        lambda console: print_training(record, console),
        is_final=False,
    )


def _kind(file: Path) -> str:
    """Return which of `RECORDS` a file is: by its name or, of a JSON file with another name, by its keys."""
    if file.name in RECORDS:
        return file.name
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return EVALUATION_FILE  # reading it will say why it cannot be read
    kinds = {"comparisons": COMPARISON_FILE, "jobs": SWEEP_FILE, "points": CURVE_FILE}
    return next((kind for key, kind in kinds.items() if isinstance(keys, dict) and key in keys), EVALUATION_FILE)


def claim_page(session: Session, page: Page) -> Path:
    """Return the path of the new page, in `output_dir` or beside the figures.

    The folder is locked, unless it may be that of a training that goes on: the page appears whole, and no run reads it.

    Raises:
        UserError: the file exists and `overwrite` is false, another run is writing the folder, or it cannot be written.
    """
    path = Path(str(session.config.path))
    if session.config.output_dir is None:
        folder = session.folder.path = path if path.is_dir() else path.parent
        setting, way_out = "path", "set output_dir to another folder"
    else:
        folder = session.folder.path
        setting, way_out = "output_dir", "choose another folder"
    target = folder / page.name
    if page.is_final:
        try:
            session.folder.lock.take(folder, setting)
        except OSError as error:
            raise cannot_write(session, target, error) from None
    if target.exists() and not session.config.overwrite:
        raise UserError(f"{setting}={folder}: {target} exists; {way_out}, or set overwrite=true to replace it")
    return target


def cannot_write(session: Session, page: Path, error: OSError) -> Exception:
    """Return the error to raise if a page cannot be written."""
    if disk_full_reason(error):
        return error
    where, reason = f"path={session.config.path}", error.strerror
    return UserError(f"{where}: {page} cannot be written ({reason}); set output_dir to a folder of yours")


def run(session: Session) -> None:
    """Write the page and print its tables."""
    page = find_page(Path(str(session.config.path)))
    target = claim_page(session, page)
    try:
        page.write(target)
    except OSError as error:
        raise cannot_write(session, target, error) from None
    page.show(open_console())
    session.folder.print_status(f"wrote {target}")
