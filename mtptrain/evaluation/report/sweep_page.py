"""The jobs of a sweep as one table on the terminal and as one HTML page."""

# K draft length

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mtptrain.evaluation.head_result import span
from mtptrain.evaluation.report.comparison_page import comparison_headline
from mtptrain.evaluation.report.drawing import canvas, name_rows, series_style, svg, tick
from mtptrain.evaluation.report.tables import (
    MISSING_VALUE,
    Cell,
    Grid,
    gain_cell,
    length_cell,
    print_grid,
    share_cell,
    speed_cell,
)
from mtptrain.evaluation.report.template import captioned, sentence, write_page
from mtptrain.evaluation.report.training_plots import LENGTH, draw_named
from mtptrain.evaluation.result import Evaluation
from mtptrain.evaluation.sweep import JobFigures, JobOutcome, SweepJob, SweepResult, read_figures
from mtptrain.run.record import MetricCurve, RunRecord

SWEEP_PAGE = "sweep.html"
Figures = list[tuple[SweepJob, JobFigures]]
STATES = {JobOutcome.failed: "FAILED", JobOutcome.uncertified: "certificate FAILED"}


def job_figures(sweep: SweepResult, folder: Path) -> Figures:
    """Return every job with the results in its folder."""
    return [(job, read_figures(folder / job.folder)) for job in sweep.jobs]


def counted(figures: Figures) -> list[tuple[SweepJob, Evaluation]]:
    """Return the jobs whose evaluation counts: it is written and its certificate passed."""
    evaluated = [(job, one.evaluation) for job, one in figures if one.evaluation is not None]
    return [(job, evaluation) for job, evaluation in evaluated if evaluation.certificate.passed]


def sweep_headline(figures: Figures) -> str:
    """Return how many jobs are done, and the one with the highest acceptance length if all compare, in words."""
    done = sum(job.outcome is JobOutcome.done for job, _ in figures)
    lead = f"{done} of {len(figures)} jobs done"
    evaluations = counted(figures)
    if len(evaluations) < 2 or len({_conditions(one) for _, one in evaluations}) > 1:
        return lead
    (best, evaluation), (_, second) = sorted(evaluations, key=lambda one: _length(one[1]), reverse=True)[:2]
    if f"{_length(evaluation):.2f}" == f"{_length(second):.2f}":
        return lead
    measured = evaluation.last_head.replay[evaluation.draft_length]
    interval = f" ({span(measured.interval)})" if measured.interval is not None else ""
    return f"{lead}; {best.label} has the most tokens a pass, {_length(evaluation):.2f}{interval} at K=" + (
        f"{evaluation.draft_length}"
    )


def _conditions(evaluation: Evaluation) -> str:
    """Return what two evaluations must share for their acceptance lengths to be compared."""
    prompts = [(one.name, one.sha256, one.used) for one in evaluation.prompts.sources]
    sizes = (evaluation.prompts.count, evaluation.prompts.prompt_tokens, evaluation.prompts.new_tokens)
    return repr((evaluation.draft_length, evaluation.backbone.fingerprint, evaluation.policy, prompts, sizes))


def _length(evaluation: Evaluation) -> float:
    return evaluation.last_head.replay[evaluation.draft_length].acceptance_length or 0.0


def sweep_notes(figures: Figures, folder: Path) -> list[str]:
    """Return the reason of every failure and, if heads compare, the command for their paired gains."""
    notes = [f"{job.label}: {job.reason}" for job, _ in figures if job.reason is not None]
    has_checkpoints = [(job, one) for job, one in figures if (folder / job.folder / "checkpoints").is_dir()]
    heads = [(job, one.record) for job, one in has_checkpoints if is_head(one.record)]
    if len(heads) > 1:
        first = heads[0][1]  # heads of another backbone are refused by the comparison itself
        backbone = [] if first is None else first.backbone
        checkpoints = f"checkpoints=[{','.join(_by_setting([job for job, _ in heads], folder))}]"
        command = shlex.join(["python", "-m", "mtptrain", "+recipe=compare", *backbone, checkpoints])
        is_measured = any(one.evaluation is not None for _, one in figures)
        reason = ": the highest of several is too high by chance" if is_measured else ""
        notes.append(f"run {command} for paired gains{reason}")
    return notes


def _by_setting(jobs: list[SweepJob], folder: Path) -> list[str]:
    """Return what a comparison takes: jobs that differ in the seed alone as runs of one setting, which needs stock."""
    groups: dict[str, list[str]] = {}
    for job in jobs:
        others = repr({name: value for name, value in job.settings.items() if name != "seed"})
        groups.setdefault(others, []).append(str(folder / job.folder))
    settings = [runs[0] if len(runs) == 1 else f"[{','.join(runs)}]" for runs in groups.values()]
    return settings if len(settings) > 1 else ["stock", *settings]


def is_head(record: RunRecord | None) -> bool:
    """Return whether a job has trained a head, and no backbone."""
    return record is not None and record.task != "backbone"


def sweep_table(figures: Figures) -> Grid:
    """Return the varied settings, the figures and the state of every job."""
    names = list(dict.fromkeys(name for job, _ in figures for name in job.settings))
    columns = [column for column in COLUMNS if any(COLUMNS[column](one) is not None for _, one in figures)]
    lengths = {one.evaluation.draft_length for _, one in figures if one.evaluation is not None}
    if len(lengths) == 1:  # then it stands in the header
        columns = [column for column in columns if column != "K"]
    shown = [
        f"{column}\nK={min(lengths)}" if column in OF_LONGEST and len(lengths) == 1 else column for column in columns
    ]
    headers = [*(_short_names(names) or ["job"]), *shown, "state"]
    rows = []
    for job, one in figures:
        settings = [Cell(job.settings.get(name, MISSING_VALUE)) for name in names] or [Cell(job.folder)]
        cells = [COLUMNS[column](one) or Cell(MISSING_VALUE) for column in columns]
        rows.append([*settings, *cells, Cell(STATES.get(job.outcome, job.outcome.value))])
    note = "; ".join(f"{column}: {NOTES[column]}" for column in columns if column in NOTES)
    return Grid("Jobs", headers, rows, f"{note}." if note else "")


def _short_names(names: list[str]) -> list[str]:
    """Return the last parts of the names of settings, or the whole names if two have the same."""
    short = [name.rpartition(".")[2] for name in names]
    return short if len(set(short)) == len(names) else names


def _tokens_a_pass(one: JobFigures) -> Cell | None:
    if one.evaluation is None:
        return None
    return length_cell(one.evaluation.last_head.replay[one.evaluation.draft_length])


def _gain(one: JobFigures) -> Cell | None:
    if one.evaluation is None or one.evaluation.gain is None:
        return None
    return gain_cell(one.evaluation.longest_gain)


def _speed(one: JobFigures) -> Cell | None:
    if one.evaluation is None:
        return None
    timed = one.evaluation.speedup[one.evaluation.first_batch][one.evaluation.last_head.name]
    return Cell(speed_cell(max(timed.values(), key=lambda speed: speed.median)).value)  # its interval is in the report


def _draft_length(one: JobFigures) -> Cell | None:
    return None if one.evaluation is None else Cell(str(one.evaluation.draft_length))


def _last(one: JobFigures, name: str) -> Cell | None:
    curve = None if one.record is None else one.record.curves.get(name)
    return None if curve is None else share_cell(curve.last)


def _verdict(one: JobFigures) -> Cell | None:
    return None if one.comparison is None else Cell(comparison_headline(one.comparison)[1])


OF_LONGEST = ("tok/pass", "gain")
COLUMNS = {
    "K": _draft_length,
    "tok/pass": _tokens_a_pass,
    "gain": _gain,
    "speed-up": _speed,
    "loss": lambda one: _last(one, "loss/step_1"),
    "verdict": _verdict,
}

NOTES = {
    "tok/pass": "tokens a pass at the longest K, by replay, with its 95 % interval",
    "gain": "over stock",
    "speed-up": "the highest of all K at the smallest batch, ? if the job's report doubts it",
    "loss": "of the first draft step, in the last row",
}


def sweep_plots(figures: Figures) -> dict[str, str]:
    """Return the figures of a sweep that have data, by their captions."""
    drawn = {
        "Acceptance length by job (95 % intervals)": _lengths(figures),
        "Training loss, first draft step": _curves(figures, "loss/step_1", "sweep-loss", "loss"),
        "Acceptance alpha, first draft step": _curves(figures, "alpha/step_1", "sweep-alpha", "alpha"),
        "Acceptance length by replay, longest K": _replays(figures),
        "Gradient norm before clipping": _curves(figures, "gradient_norm", "sweep-norm", "gradient norm"),
        "Learning rate": _curves(figures, "learning_rate", "sweep-rate", "learning rate"),
    }
    return {caption: text for caption, text in drawn.items() if text is not None}


def _curves(figures: Figures, metric: str, name: str, y_label: str) -> str | None:
    return _drawn(figures, lambda record: record.curves.get(metric), name, y_label)


def _replays(figures: Figures) -> str | None:
    def _longest(record: RunRecord) -> MetricCurve | None:
        lengths = record.numbered(LENGTH)
        return lengths[max(lengths)] if lengths else None

    return _drawn(figures, _longest, "sweep-replay", "tokens a pass")


def _drawn(figures: Figures, choose: Callable[[RunRecord], MetricCurve | None], name: str, y_label: str) -> str | None:
    """Draw a curve of every job that has it, in the colour of the job."""
    curves = {
        short_label(job.label): (number, curve)
        for number, (job, one) in enumerate(figures)
        if one.record is not None and (curve := choose(one.record)) is not None
    }
    return draw_named(curves, name, y_label) if curves else None


def short_label(label: str) -> str:
    """Return the values of a label, which differ between jobs; the name of its setting only if there is just one."""
    name, equals, value = label.partition("=")
    if equals and " " not in label:
        return tick(f"{name.rpartition('.')[2]}={value}")
    return tick(" ".join(part.partition("=")[2] or part for part in label.split(" ")))


def _lengths(figures: Figures) -> str | None:
    """Draw tokens a pass with its interval, a row a job whose evaluation counts, the first at the top."""
    labels = [job.label for job, _ in figures]
    measured = [(job.label, one.last_head.replay[one.draft_length]) for job, one in counted(figures)]
    known = [(label, one) for label, one in measured if one.acceptance_length is not None and one.interval is not None]
    if not known:
        return None
    figure, axes = canvas("tokens a pass", "", 1)
    figure.set_figheight(1.2 + 0.32 * len(known))
    for y, (label, one) in enumerate(known):
        colour = series_style(labels.index(label))["color"]
        axes.hlines([y], *(one.interval or (0, 0)), color=colour, linewidth=2.5, alpha=0.55)
        axes.plot([one.acceptance_length or 0], [y], "s", color=colour, markersize=5)
    name_rows(axes, [short_label(label) for label, _ in known])
    axes.margins(x=0.1)
    return svg(figure, axes, "sweep-length", "Acceptance length by job")


def write_sweep_page(sweep: SweepResult, folder: Path, path: Path) -> None:
    """Write the jobs of a sweep as an HTML file, atomically.

    Args:
        sweep: the jobs.
        folder: that holds their folders.
        path: the file; its folder is made if it is missing.
    """
    figures = job_figures(sweep, folder)
    notes = sweep_notes(figures, folder)
    failed = [f"{job.label}: {job.reason}" for job, _ in figures if job.reason is not None]
    content = {
        "title": f"mtptrain sweep of {len(sweep.jobs)} jobs in {folder}",
        "headline": sentence(sweep_headline(figures)),
        "kind": _kind(figures),
        "verdicts": [("failed", f"Failed: {line}") for line in failed],
        "notes": [sentence(note) for note in notes if note not in failed],
        "grid": sweep_table(figures),
        "figures": captioned(sweep_plots(figures)),
        "folders": {job.label: f"{job.folder} ({job.outcome.value}, {job.seconds:,.0f} s)" for job, _ in figures},
        "provenance": {
            "Command": shlex.join(sweep.command),
            "Started": sweep.started,
            "Commit": sweep.git_commit or "not a git checkout",
        },
    }
    write_page("sweep.html", content, path)


def _kind(figures: Figures) -> str:
    done = sum(job.outcome is JobOutcome.done for job, _ in figures)
    return "single" if done == len(figures) else "unclear" if done else "failed"


def print_sweep(sweep: SweepResult, folder: Path, console: Console) -> None:
    """Print headline, table and notes of a sweep."""
    figures = job_figures(sweep, folder)
    console.print(Text(sweep_headline(figures), style="bold"))
    print_grid(sweep_table(figures), console)
    for note in sweep_notes(figures, folder):
        console.print(Text(note), soft_wrap=True)
