"""The page and the table of a curve: acceptance of every checkpoint of a run against its steps."""

# K draft length

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from mtptrain.evaluation.curve import Curve, CurvePoint
from mtptrain.evaluation.head_result import chosen_text, span
from mtptrain.evaluation.report.headline import policy_text, prompts_text, seen_text
from mtptrain.evaluation.report.plots import acceptance_by_step
from mtptrain.evaluation.report.tables import Cell, Grid, gain_cell, length_cell, print_grid
from mtptrain.evaluation.report.template import captioned, origin_facts, sentence, write_page

CURVE_PAGE = "curve.html"


def curve_headline(curve: Curve) -> str:
    """Return the acceptance length of the last checkpoint and of the highest one at the longest K, as one sentence."""
    longest = curve.identity.draft_length
    known = {point.step: length for point in curve.points if (length := _length(point, longest)) is not None}
    if not known:
        return "no checkpoint is measured yet" if not curve.points else "no verify pass in any checkpoint"
    last, top = max(known), max(known, key=lambda step: known[step])
    lead = f"step {last}: {known[last]:.2f} tokens a pass at K={longest}{_interval(curve, last)}"
    if last == top:
        return f"{lead}, the highest of {len(known)} checkpoints"
    return f"{lead}; the highest of {len(known)} checkpoints is step {top} with {known[top]:.2f}{_interval(curve, top)}"


def _length(point: CurvePoint, length: int) -> float | None:
    return point.replay[length].acceptance_length


def _interval(curve: Curve, step: int) -> str:
    measured = next(point.replay[curve.identity.draft_length] for point in curve.points if point.step == step)
    return f" ({span(measured.interval)})" if measured.interval else ""


def curve_notes(curve: Curve) -> list[str]:
    """Return sentences that qualify the figures: prompts seen in training or used for a choice, skipped checkpoints."""
    last = curve.points[-1] if curve.points else None
    notes = []
    if last is not None and last.seen_prompts is not None and last.seen_prompts.seen:
        notes.append(seen_text(f"the head of step {last.step}", last.seen_prompts))
    notes += [text for one in curve.points if (text := chosen_text(f"step {one.step}", one.chosen_on))]
    if len(curve.points) > 1:
        notes.append("the highest of several checkpoints is too high by chance: choose on these prompts, report others")
    return [*notes, *curve.skipped]


def curve_table(curve: Curve) -> Grid:
    """Return acceptance length by K and the gain at the longest K, a row a checkpoint."""
    longest, has_gain = curve.identity.draft_length, curve.stock is not None
    headers = ["step", *(f"K={length}\ntok/pass" for length in curve.draft_lengths)]
    headers += [f"gain\nK={longest}"] if has_gain else []
    rows = []
    if curve.stock is not None:
        rows.append([Cell("stock"), *(length_cell(curve.stock[length]) for length in curve.draft_lengths), Cell("")])
    for point in curve.points:
        name = f"{point.step}" + (" (best)" if point.step == curve.best_step else "")
        row = [Cell(name), *(length_cell(point.replay[length]) for length in curve.draft_lengths)]
        rows.append([*row, gain_cell(point.gain[longest] if point.gain else None)] if has_gain else row)
    note = (
        f"tok/pass: tokens a pass (acceptance length) by replay, {curve.prompts.interval_text}; the "
        "same texts for all checkpoints, so neighbouring points share most of their error. Best: by the run's own "
        "measurements during training."
    )
    return Grid("Acceptance length by checkpoint", headers, rows, note)


def write_curve_page(curve: Curve, path: Path) -> None:
    """Write the curve as an HTML file, atomically."""
    plot = acceptance_by_step(curve) if curve.points else None
    content = {
        "title": f"mtptrain: all checkpoints of {curve.identity.run}",
        "kind": "single",
        "headline": sentence(curve_headline(curve)),
        "notes": [sentence(note) for note in curve_notes(curve)],
        "figures": captioned({"Acceptance length against training steps (95 % intervals)": plot}),
        "grid": curve_table(curve),
        "provenance": _provenance(curve),
    }
    write_page(CURVE_PAGE, content, path)


def _provenance(curve: Curve) -> dict[str, str]:
    return {
        **origin_facts(curve.provenance),
        "Backbone": f"{curve.backbone.name}, fingerprint {curve.backbone.fingerprint}",
        "Prompts": prompts_text(curve.prompts),
        "Policy": policy_text(curve.identity.policy),
    }


def print_curve(curve: Curve, console: Console) -> None:
    """Print headline, notes and table."""
    console.print(Text(curve_headline(curve), style="bold"))
    for note in curve_notes(curve):
        console.print(Text(note, style="yellow"))
    print_grid(curve_table(curve), console)
