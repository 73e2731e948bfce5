"""The course of a training as inline SVG: loss, acceptance, replay, learning rate, gradient norm and speed."""

# K draft length, k draft step or position in the draft from 1

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtptrain.evaluation.report.drawing import COLOURS, series_style, step_canvas, svg, tick
from mtptrain.run.record import MetricCurve, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 240  # of a line; more rows are drawn as means of equally many
NAME_HEIGHT = 0.055  # of the name of a line, as a part of the axis
LENGTH, EXPECTED, ACCEPTED = "replay/acceptance_length_", "replay/expected_length_", "replay/accepted_"
HELDOUT = "heldout/alpha_"
SKEWED = 30.0  # a largest value over a median from which a logarithmic axis shows more


@dataclass(frozen=True, slots=True)
class _Lines:
    """Numbered lines of one colour, the strongest one first or last, with the letter that names them."""

    curves: Mapping[int, MetricCurve]
    letter: str
    strongest_first: bool = True
    linestyle: str = "-"
    marker: str = ""
    label: str | None = None
    ending: str = ""  # of the names


def training_figures(record: RunRecord) -> dict[str, str]:
    """Return a figure for each part of the record that the run has, by its caption."""
    drawn = {
        "Training loss by draft step": _draft_steps(record, "loss/step_", "loss"),
        "Acceptance alpha by draft step": _alphas(record),
        "Acceptance length by replay": replay_lengths(record),
        "Acceptance by position, replay": _replay_positions(record),
        "Learning rate": _single(record, "learning_rate", "learning rate"),
        "Gradient norm before clipping": _single(record, "gradient_norm", "gradient norm"),
        "Training speed": _single(record, "tokens_per_second", "tokens a second"),
        "Load of the busiest expert": _draft_steps(record, "experts/largest_load_", "over the mean", "module "),
        "Shares of the mixture": _shares(record),
    }
    return {caption: text for caption, text in drawn.items() if text is not None}


def _draft_steps(record: RunRecord, prefix: str, y_label: str, letter: str = "k=") -> str | None:
    curves = record.numbered(prefix)
    name = prefix.strip("_").replace("/", "-")
    return _figure(record, name, y_label, [_Lines(curves, letter)]) if curves else None


def _alphas(record: RunRecord) -> str | None:
    """Draw alpha against steps, a line a draft step, on the training text and on held-out text."""
    parts = [
        _Lines(record.numbered("alpha/step_"), "k=", label="training text"),
        _Lines(record.numbered(HELDOUT), "", linestyle="--", marker="o", label="held-out text"),
    ]
    parts = [part for part in parts if part.curves]
    return _figure(record, "alpha", "alpha", parts) if parts else None


def replay_lengths(record: RunRecord) -> str | None:
    """Draw tokens a pass by replay against steps, a line a K; None if the run replays nothing."""
    policy, expected = record.numbered(LENGTH), record.numbered(EXPECTED)
    parts = [
        _Lines(policy, "K=", strongest_first=False, marker="s", label="decoding policy"),
        _Lines(
            expected,
            "K=",
            strongest_first=False,
            linestyle="--",
            marker="o",
            label="expected, temperature 1",
            ending=", T=1",
        ),
    ]
    parts = [part for part in parts if part.curves]
    return _figure(record, "replay-length", "tokens a pass", parts) if parts else None


def _replay_positions(record: RunRecord) -> str | None:
    longest = max(record.numbered(LENGTH), default=0)
    curves = record.numbered(ACCEPTED, f"_of_{longest}")
    parts = [_Lines(curves, "k=", marker="s")]
    return _figure(record, "replay-position", f"share accepted (K = {longest})", parts) if curves else None


def _single(record: RunRecord, name: str, y_label: str) -> str | None:
    curve = record.curves.get(name)
    return _figure(record, name, y_label, [_Lines({0: curve}, "")]) if curve is not None else None


def _figure(record: RunRecord, name: str, y_label: str, parts: list[_Lines]) -> str:
    curves = [curve for part in parts for curve in part.curves.values()]
    figure, axes = step_canvas(y_label, min(curve.steps[0] for curve in curves), record.last_step)
    ends: dict[str, tuple[int, float]] = {}
    for part in parts:
        ends |= _draw_lines(axes, part)
    _scale(axes, curves)
    _name_ends(axes, ends)
    return svg(figure, axes, f"training-{name}", f"{y_label} by training step")


def _draw_lines(axes: Axes, part: _Lines) -> dict[str, tuple[int, float]]:
    """Draw the lines of a part, and return the last point of each by its name."""
    numbers, ends = list(part.curves), {}
    for place, (number, curve) in enumerate(part.curves.items(), start=1):
        rank = len(numbers) + 1 - place if part.strongest_first else place
        is_labelled = part.label is not None and number == (numbers[0] if part.strongest_first else numbers[-1])
        thin = thinned(curve)
        axes.plot(
            thin.steps,
            thin.values,
            color=COLOURS["trained"],
            alpha=0.35 + 0.65 * rank / len(numbers),
            linestyle=part.linestyle,
            marker=part.marker or ("." if len(thin.steps) < 2 else ""),
            markersize=4,
            label=part.label if is_labelled else None,
        )
        if part.letter and thin.last is not None:
            ends[f"{part.letter}{number}{part.ending}"] = (thin.steps[-1], thin.last)
    return ends


def _name_ends(axes: Axes, ends: Mapping[str, tuple[int, float]]) -> None:
    """Write the names of lines at their ends, one above the other where the ends lie close together."""
    axes.autoscale_view()  # before places are computed
    to_axes, floor = axes.transData - axes.transAxes, -1.0
    points = [(name, to_axes.transform(end)) for name, end in ends.items()]
    for name, (x, y) in sorted(points, key=lambda point: float(point[1][1])):
        floor = max(float(y), floor + NAME_HEIGHT)
        place = (float(x) + 0.015, floor - NAME_HEIGHT / 2)
        axes.annotate(name, place, xycoords="axes fraction", fontsize=8, annotation_clip=False)


def thinned(curve: MetricCurve) -> MetricCurve:
    """Return at most `MOST_POINTS` points: means of equally many rows, each at the last of its steps."""
    size = math.ceil(len(curve.steps) / MOST_POINTS)
    if size <= 1:
        return curve
    thin = MetricCurve()
    for start in range(0, len(curve.steps), size):
        known = [value for value in curve.values[start : start + size] if math.isfinite(value)]
        thin.steps.append(curve.steps[min(start + size, len(curve.steps)) - 1])
        thin.values.append(sum(known) / len(known) if known else math.nan)
    return thin


def _scale(axes: Axes, curves: list[MetricCurve]) -> None:
    """Set a logarithmic axis if a few values would hide the others; leave room above and below otherwise."""
    values = sorted(value for curve in curves for value in curve.values if math.isfinite(value))
    if values[0] > 0 and values[-1] > SKEWED * values[len(values) // 2]:
        axes.set_yscale("log")
    else:
        axes.margins(y=0.1)


def _shares(record: RunRecord) -> str | None:
    shares = {name.removeprefix("share/"): one for name, one in record.curves.items() if name.startswith("share/")}
    curves = {tick(name): (number, one) for number, (name, one) in enumerate(shares.items())}
    return draw_named(curves, "training-shares", "share of the tokens") if shares else None


def draw_named(curves: Mapping[str, tuple[int, MetricCurve]], name: str, y_label: str) -> str:
    """Draw curves by training step, a colour each.

    Args:
        curves: by their text in the legend, each with the number that chooses its colour.
        name: of the figure, unique on the page.
        y_label: of the axis.
    """
    first = min(curve.steps[0] for _, curve in curves.values())
    last = max(curve.steps[-1] for _, curve in curves.values())
    figure, axes = step_canvas(y_label, first, last)
    for title, (number, curve) in curves.items():
        thin = thinned(curve)
        axes.plot(
            thin.steps, thin.values, marker="." if len(thin.steps) < 30 else "", label=title, **series_style(number)
        )
    _scale(axes, [curve for _, curve in curves.values()])
    return svg(figure, axes, name, f"{y_label} by training step")
