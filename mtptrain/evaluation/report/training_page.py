"""The course of a training: a part of the report of its evaluation, or a report of its own before there is one."""

# K draft length

from __future__ import annotations

import math
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mtptrain.errors import UserError
from mtptrain.evaluation.report.tables import Cell, Grid, print_grid
from mtptrain.evaluation.report.template import captioned, origin_facts, sentence, write_page
from mtptrain.evaluation.report.training_plots import EXPECTED, HELDOUT, LENGTH, training_figures
from mtptrain.evaluation.result import Evaluation
from mtptrain.run.folder import PROVENANCE_FILE, read_provenance
from mtptrain.run.record import RunRecord, read_record

CHECKPOINTS = "checkpoints"  # of a run's folder


def training_of(evaluation: Evaluation, folder: Path) -> RunRecord | None:
    """Return the record of the training of an evaluation's last head; None if it is not at hand.

    Args:
        evaluation: of the head.
        folder: of the evaluation; that of the training if it was measured at the end of one.
    """
    checkpoint = Path(evaluation.last_head.checkpoint)
    folders = [folder, *([checkpoint.parent.parent] if checkpoint.parent.name == CHECKPOINTS else [])]
    for one in folders:
        try:
            record = read_record(one)
        except OSError:  # the evaluation counts without the course of its training
            continue
        if record is not None:
            return record
    return None


def training_content(record: RunRecord) -> dict[str, object]:
    """Return the values of the names in parts.html that show a training."""
    return {
        "training_text": sentence(training_text(record)),
        "training_figures": captioned(training_figures(record)),
    }


def training_text(record: RunRecord) -> str:
    """Return how far a training is, and its last loss and acceptance, as one sentence."""
    steps = "an unknown number" if record.num_steps is None else f"{record.num_steps:,}"
    lead = f"step {record.last_step:,} of {steps}"
    parts = [_last(record, "loss/step_1", "loss {:.3f} at the first draft step"), _last_length(record)]
    return "; ".join([lead, *(part for part in parts if part)])


def state_text(record: RunRecord) -> str:
    """Return whether a training is finished, goes on or was interrupted, and the next command, as one sentence."""
    if record.is_finished:
        settings = [*record.backbone, f"checkpoint={record.folder}"]
        way_on = shlex.join(["python", "-m", "mtptrain", "+recipe=evaluate", *settings])
        return "the training is finished" if record.task == "backbone" else f"finished and not measured here: {way_on}"
    if record.is_running:
        return "the training goes on; these figures are those of its last row"
    return f"not finished; continue with resume=auto output_dir={record.folder}"


def _last(record: RunRecord, name: str, form: str) -> str | None:
    curve = record.curves.get(name)
    return None if curve is None or curve.last is None else form.format(curve.last)


def _last_length(record: RunRecord) -> str | None:
    longest = max(record.numbered(LENGTH), default=None)
    return _last(record, f"{LENGTH}{longest}", f"{{:.2f}} tokens a pass at K={longest} by replay")


def training_table(record: RunRecord) -> Grid:
    """Return first, best and last value of the figures by which a training is judged."""
    names = {f"loss/step_{k}": f"loss, k={k}" for k in record.numbered("loss/step_")}
    names |= {f"alpha/step_{k}": f"alpha, k={k}" for k in record.numbered("alpha/step_")}
    names |= {f"{HELDOUT}{k}": f"held-out alpha, k={k}" for k in record.numbered(HELDOUT)}
    names |= {f"{LENGTH}{k}": f"tok/pass, K={k}" for k in record.numbered(LENGTH)}
    names |= {f"{EXPECTED}{k}": f"expected tok/pass, K={k}" for k in record.numbered(EXPECTED)}
    rows = []
    for name, title in names.items():
        curve = record.curves[name]
        pick = min if name.startswith("loss") else max
        known = [(value, step) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
        best, step = pick(known)
        rows.append(
            [Cell(title), Cell(f"{known[0][0]:.3f}"), Cell(f"{best:.3f}", f"step {step:,}"), _shown(curve.last)]
        )
    note = (
        "Loss and alpha: means over the training text since the row before. Held-out alpha: on a few held-out rows. "
        "Alpha is the overlap of the head's and the backbone's distributions, the probability that a sampled draft is "
        "accepted. tok/pass: tokens a pass (acceptance length), by replay of a few held-out prompts. The best of many "
        "is too good by chance."
    )
    return Grid("Figures of the training", ["figure", "first", "best", "last"], rows, note)


def _shown(value: float | None) -> Cell:
    return Cell("-" if value is None else f"{value:.3f}")


def write_training_page(record: RunRecord, path: Path) -> None:
    """Write the report of a training that has no evaluation, as an HTML file, atomically."""
    content = {
        "title": f"mtptrain: training in {record.folder}",
        "kind": "single",
        "headline": sentence(training_text(record)),
        "notes": [sentence(state_text(record))],
        "grid": training_table(record),
        "provenance": _provenance(record),
        **training_content(record),
    }
    write_page("training.html", content, path)


def _provenance(record: RunRecord) -> dict[str, str]:
    """Return the origin of a run, name by name; nothing of one whose record cannot be read."""
    try:
        return origin_facts(read_provenance(record.folder))
    except (OSError, UserError):
        return {PROVENANCE_FILE: "cannot be read"}


def print_training(record: RunRecord, console: Console) -> None:
    """Print headline, state and table of a training."""
    console.print(Text(training_text(record), style="bold"))
    console.print(Text(state_text(record)), soft_wrap=True)
    print_grid(training_table(record), console)
