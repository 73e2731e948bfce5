"""Send an evaluation to the trackers of its run: tables, plots, and its files as an artifact."""

from __future__ import annotations

from typing import Any

from mtptrain.evaluation.head_result import POSITION_METRICS
from mtptrain.evaluation.report import plots
from mtptrain.evaluation.result import Evaluation
from mtptrain.run.folder import RunFolder
from mtptrain.run.tracking import Trackers

Row = tuple[Any, ...]
PLOTS = (
    plots.acceptance_length,
    plots.gain,
    plots.speedup,
    plots.batch_speedup,
    plots.acceptance_by_position,
    plots.losses,
    plots.calibration,
)


def acceptance_lengths(evaluation: Evaluation) -> list[Row]:
    """Return a row for every head and draft length."""
    return [
        (head.name, length, measured.acceptance_length, *(measured.interval or (None, None)))
        for head in evaluation.heads
        for length, measured in head.replay.items()
    ]


def acceptance_by_position(evaluation: Evaluation) -> list[Row]:
    """Return a row of `POSITION_METRICS` for every head and position of the longest draft."""
    return [
        (head.name, position, *metrics)
        for head in evaluation.heads
        for position, metrics in enumerate(
            zip(*head.by_position(evaluation.draft_length).values(), strict=True), start=1
        )
    ]


def speedups(evaluation: Evaluation) -> list[Row]:
    """Return a row for every head, batch and draft length."""
    return [
        (head, size, length, measured.median, *measured.quartiles)
        for size, heads in evaluation.speedup.items()
        for head, lengths in heads.items()
        for length, measured in lengths.items()
    ]


def publish(trackers: Trackers, run_folder: RunFolder, evaluation: Evaluation) -> None:
    """Send an evaluation's tables, plots and report to the trackers, if any is on."""
    if not trackers.is_on:
        return
    columns = ["head", "K", "tokens_a_pass", "low", "high"]
    trackers.table("evaluation/acceptance_length", columns, acceptance_lengths(evaluation))
    columns = ["head", "position", *(metric.replace("-", "") for metric in POSITION_METRICS)]
    trackers.table("evaluation/acceptance_by_position", columns, acceptance_by_position(evaluation))
    columns = ["head", "batch", "K", "median", "lower_quartile", "upper_quartile"]
    trackers.table("evaluation/speedup", columns, speedups(evaluation))
    drawn = {plot.__name__: plot(evaluation) for plot in PLOTS}
    texts = {f"{name}.svg": text for name, text in drawn.items() if text is not None}
    files = [run_folder.path / name for name in ("evaluation.json", "report.html")]
    trackers.artifact("evaluation", "evaluation", files, texts)
