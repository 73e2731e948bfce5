"""The measured figures as inline SVG; colours follow the page through CSS variables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtptrain.evaluation.report.anatomy import KINDS
from mtptrain.evaluation.report.table import draft_lengths, first_batch, measured_gain, measured_speedup

# K draft length, k position in the draft from 1.

INK = "#1c2127"
COLOURS = {"stock": "#6f7680", "trained": "#0b6bb0"}
MARKERS = {"stock": "o", "trained": "s"}
# The colours above become CSS, so that an inline figure follows the page's light or dark scheme.
THEME = {INK: "currentColor", **{colour: f"var(--{name}, {colour})" for name, colour in COLOURS.items()}}
SIZE_INCHES = (4.6, 3.0)  # at 350 CSS pixels, a phone's column, text stays above 10 pixels
DODGE = 0.06  # of one K, so that the intervals of two heads stand side by side
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def acceptance_by_position(evaluation: dict[str, Any]) -> str:
    """SVG: share of drafts kept at each position once all before it were, at the longest K."""
    length = draft_lengths(evaluation)[-1]
    figure, axes = _canvas(f"position k in the draft (K = {length})", "share accepted", int(length))
    for offset, head in _dodged(evaluation):
        shares = [float("nan") if share is None else share for share in head["replay"][length]["conditional"]]
        _draw_series(axes, head["name"], [k + offset for k in range(1, len(shares) + 1)], shares)
    axes.set_ylim(0, 1.02)
    return _svg(figure, axes, "position", "Acceptance by draft position")


def acceptance_length(evaluation: dict[str, Any]) -> str:
    """SVG: tokens a verify pass against K, with 95 % intervals and the ceiling K+1."""
    lengths = [int(length) for length in draft_lengths(evaluation)]
    figure, axes = _canvas("draft length K", "tokens a verify pass", lengths[-1])
    top = 1.0
    for offset, head in _dodged(evaluation):
        measured = {k: head["replay"][str(k)] for k in lengths if str(k) in head["replay"]}
        places = [k + offset for k in measured]
        _draw_spans(axes, head["name"], places, [found["interval"] for found in measured.values()])
        _draw_series(axes, head["name"], places, [found["acceptance_length"] for found in measured.values()])
        top = max(top, *(found["interval"][1] for found in measured.values()))
    edges = [lengths[0] - 0.5, lengths[-1] + 0.5]
    axes.plot(edges, [edge + 1 for edge in edges], color=INK, linewidth=1, linestyle="--", label="ceiling K+1")
    # The ceiling of a long draft lies far above what is measured: let it leave the frame.
    axes.set_ylim(1, min(lengths[-1] + 1.2, max(2.2, 1 + (top - 1) * 1.4)))
    return _svg(figure, axes, "length", "Acceptance length against draft length")


def gain(evaluation: dict[str, Any]) -> str | None:
    """SVG: trained minus stock acceptance length against K, with 95 % intervals; None without two heads."""
    measured = {int(k): found for k in draft_lengths(evaluation) if (found := measured_gain(evaluation, k))}
    if not measured:
        return None
    figure, axes = _canvas("draft length K", "gain, tokens a pass", max(measured))
    axes.axhline(0, color=INK, linewidth=1, linestyle="--", label="no gain")
    _draw_spans(axes, "trained", list(measured), [found["interval"] for found in measured.values()])
    _draw_series(
        axes, "trained", list(measured), [found["gain"] for found in measured.values()], label="trained - stock"
    )
    axes.margins(y=0.15)
    return _svg(figure, axes, "gain", "Gain of the trained head over the stock head")


def speedup(evaluation: dict[str, Any]) -> str | None:
    """SVG: tokens/s over plain decoding against K, with quartiles, prompts and break-even; None if not timed."""
    lengths = draft_lengths(evaluation)
    figure, axes = _canvas("draft length K", "speed-up over plain", int(lengths[-1]))
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="break-even")
    timed = False
    for offset, head in _dodged(evaluation):
        name = head["name"]
        measured = {int(k): found for k in lengths if (found := measured_speedup(evaluation, name, k))}
        timed = timed or bool(measured)
        places = [k + offset for k in measured]
        for place, found in zip(places, measured.values(), strict=True):
            batches = found["per_batch"]
            axes.plot([place] * len(batches), batches, ".", color=COLOURS[name], alpha=0.35, markersize=4)
        _draw_spans(axes, name, places, [found["quartiles"] for found in measured.values()])
        _draw_series(axes, name, places, [found["median"] for found in measured.values()])
        predicted = [
            evaluation["steps"][first_batch(evaluation)][name]["predicted_speedup"][str(k)]["median"] for k in measured
        ]
        label = "predicted" if head is evaluation["heads"][0] else None
        axes.plot(places, predicted, "_", color=COLOURS[name], markersize=11, label=label)
    axes.margins(y=0.15)
    return _svg(figure, axes, "speedup", "Speed-up on the clock against draft length") if timed else None


def batch_speedup(evaluation: dict[str, Any]) -> str | None:
    """SVG: the last head's speed-up against the batch, a line a K, with break-even; None with one batch size."""
    sizes = sorted(int(size) for size in evaluation["speedup"])
    if len(sizes) < 2:
        return None
    name = evaluation["heads"][-1]["name"]
    figure, axes = _canvas("batch", f"speed-up of the {name} head", 1)
    axes.set(xlim=(-0.5, len(sizes) - 0.5), xticks=range(len(sizes)), xticklabels=sizes)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="break-even")
    lengths = draft_lengths(evaluation)
    for number, length in enumerate(lengths):
        found = [evaluation["speedup"][str(size)][name][length]["median"] for size in sizes]
        strength = 0.35 + 0.65 * (number + 1) / len(lengths)
        axes.plot(range(len(sizes)), found, marker="o", markersize=4, color=COLOURS[name], alpha=strength)
        axes.annotate(
            f"K={length}", (len(sizes) - 1, found[-1]), xytext=(5, -3), textcoords="offset points", fontsize=8
        )
    axes.margins(y=0.15)
    return _svg(figure, axes, "batches", "Speed-up on the clock against the batch")


def calibration(evaluation: dict[str, Any]) -> str:
    """SVG: acceptance of drafted tokens against the head's confidence in them, with the diagonal."""
    figure, axes = _canvas("head's confidence", "share accepted", 1)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="calibrated")
    for head in evaluation["heads"]:
        bins = head["calibration"]["bins"]
        _draw_series(axes, head["name"], [one["confidence"] for one in bins], [one["acceptance"] for one in bins])
    return _svg(figure, axes, "calibration", "Acceptance against the head's confidence")


def losses(evaluation: dict[str, Any]) -> str:
    """SVG: share of the lost drafted tokens by class of the text's token, a bar a head."""
    figure, axes = _bars(evaluation, "token_class", "lost_share", "share of the lost tokens")
    return _svg(figure, axes, "losses", "Where drafted tokens are lost")


def acceptance_by(evaluation: dict[str, Any], kind: str) -> str | None:
    """SVG: share accepted of the drafted tokens in each bucket of a kind, a bar a head; None with one bucket."""
    if len(_buckets(evaluation, kind)) < 2:
        return None
    figure, axes = _bars(evaluation, kind, "acceptance", "share accepted")
    axes.set(xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1])
    return _svg(figure, axes, f"by-{kind}", f"Acceptance by {KINDS[kind]}")


def _buckets(evaluation: dict[str, Any], kind: str) -> list[str]:
    """Names of the buckets that any head reached, in their order."""
    every = [row["bucket"] for head in evaluation["heads"] for row in head["breakdown"]["by"].get(kind, [])]
    return list(dict.fromkeys(every))


def _bars(evaluation: dict[str, Any], kind: str, field: str, x_label: str) -> tuple[Figure, Axes]:
    """Horizontal bars of one field, a group a bucket, the first at the top."""
    heads, buckets = evaluation["heads"], _buckets(evaluation, kind)
    figure, axes = _canvas(x_label, "", 1)
    figure.set_figheight(1.2 + 0.16 * (1 + len(heads)) * len(buckets))
    height = 0.8 / len(heads)
    for number, head in enumerate(heads):
        found = {row["bucket"]: row[field] for row in head["breakdown"]["by"].get(kind, [])}
        places = [place + (number - (len(heads) - 1) / 2) * height for place in range(len(buckets))]
        widths = [found.get(bucket, 0.0) for bucket in buckets]
        axes.barh(places, widths, height * 0.92, color=COLOURS[head["name"]], label=head["name"])
    axes.set(yticks=range(len(buckets)), yticklabels=map(_tick, buckets), ylim=(len(buckets) - 0.5, -0.5))
    axes.grid(False)
    axes.grid(axis="x", color=INK, alpha=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0, right=None)
    axes.autoscale(axis="x")
    axes.set_xlim(left=0)
    return figure, axes


def _tick(name: str) -> str:
    """A bucket's name as a tick label: what a domain's name holds is no formula, and a long one loses its middle."""
    short = name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"
    return short.replace("$", r"\$")


def _dodged(evaluation: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    heads = evaluation["heads"]
    middle = (len(heads) - 1) / 2
    return [((place - middle) * 2 * DODGE, head) for place, head in enumerate(heads)]


def _canvas(x_label: str, y_label: str, longest: int) -> tuple[Figure, Axes]:
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0.5, longest + 0.5), xticks=range(1, longest + 1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
    return figure, axes


def _draw_series(
    axes: Axes, name: str, places: Sequence[float], values: Sequence[float], label: str | None = None
) -> None:
    axes.plot(places, values, color=COLOURS[name], marker=MARKERS[name], markersize=5, label=label or name)


def _draw_spans(axes: Axes, name: str, places: Sequence[float], spans: Sequence[Sequence[float]]) -> None:
    lows, highs = [low for low, _ in spans], [high for _, high in spans]
    axes.vlines(places, lows, highs, color=COLOURS[name], linewidth=2.5, alpha=0.55)


def _svg(figure: Figure, axes: Axes, name: str, description: str) -> str:
    """The figure as an `<svg>` element: the same bytes for the same data, ids of its own, colours as CSS."""
    target = StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        _, labels = axes.get_legend_handles_labels()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(labels), 3), columnspacing=1.4)
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    text = target.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers its groups afresh in every figure; one page holds several.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(THEME), lambda found: THEME[found.group()], text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
