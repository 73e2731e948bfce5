"""Figures of one style as inline SVG; colours follow the page through CSS variables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from mtptrain.evaluation.head_result import Interval

if TYPE_CHECKING:  # a third of a second of every start, and drawn once at the end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

INK = "#1c2127"
COLOURS = {"stock": "#6f7680", "trained": "#0b6bb0"}
MARKERS = {"stock": "o", "trained": "s"}
# Of several settings or jobs: the first two are those of the heads.
SERIES_COLOURS = (*COLOURS.values(), "#b8561b", "#14713d", "#7a3fa3", "#a33a5d", "#6b6a12", "#0f7d7d")
SERIES_MARKERS, SERIES_LINES = "osD^vP*X", ("-", "--", ":", "-.")
# The colours above become CSS, so that an inline figure follows the page's light or dark scheme.
THEME = {INK: "currentColor", **{colour: f"var(--{name}, {colour})" for name, colour in COLOURS.items()}}
THEME |= {
    colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(SERIES_COLOURS) if colour not in THEME
}
SIZE_INCHES = (4.6, 3.0)  # at 350 CSS pixels, a phone's column, text stays above 10 pixels
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


def tick(name: str) -> str:
    """Return a bucket's name as a tick label: no dollar sign starts a formula, and a long name loses its middle."""
    short = name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"
    return short.replace("$", r"\$")


def few_ticks(integer: bool = False) -> MaxNLocator:
    """Return a locator of at most six round ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=integer)


def canvas(x_label: str, y_label: str, longest: int) -> tuple[Figure, Axes]:
    """Return an empty figure whose x axis has a tick for each whole number from 1 to `longest`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0.5, longest + 0.5), xticks=range(1, longest + 1))
        axes.yaxis.set_major_locator(few_ticks())
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
    return figure, axes


def step_canvas(y_label: str, first: int, last: int) -> tuple[Figure, Axes]:
    """Return an empty figure over training steps, with room at the right for the name of a line."""
    figure, axes = canvas("training steps", y_label, 1)
    room = max(0.05 * (last - first), 0.5)  # of one step, too, the axis has whole numbers
    axes.set(xlim=(first - room, last + 2 * room))
    axes.xaxis.set_major_locator(few_ticks(integer=True))
    return figure, axes


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Turn the axes for horizontal bars or intervals: a name for each whole number of y, the first at the top."""
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.grid(False)
    axes.grid(axis="x", color=INK, alpha=0.12)
    axes.xaxis.set_major_locator(few_ticks())
    axes.autoscale(axis="x")


def draw_series(axes: Axes, name: str, xs: Sequence[float], values: Sequence[float], label: str | None = None) -> None:
    """Draw the line of a head with markers."""
    axes.plot(xs, values, color=COLOURS[name], marker=MARKERS[name], markersize=5, label=label or name)


def draw_spans(axes: Axes, colour: str, xs: Sequence[float], spans: Sequence[Interval]) -> None:
    """Draw an interval at each x, in the colour of a head or in any other."""
    lows, highs = [low for low, _ in spans], [high for _, high in spans]
    axes.vlines(xs, lows, highs, color=COLOURS.get(colour, colour), linewidth=2.5, alpha=0.55)


def series_style(number: int) -> dict[str, Any]:
    """Return colour and kind of the line of one of several series; eight colours, then other dashes."""
    colours = len(SERIES_COLOURS)
    return {
        "color": SERIES_COLOURS[number % colours],
        "linestyle": SERIES_LINES[number // colours % len(SERIES_LINES)],
    }


def svg(figure: Figure, axes: Axes, name: str, description: str) -> str:
    """Return the figure as an `<svg>` element: the same bytes for the same data, ids of its own, colours as CSS.

    Args:
        figure: to draw.
        axes: its axes; a legend is added if any line has a label.
        name: begins the ids, so it is unique on a page.
        description: for screen readers; a constant, since it is not escaped.
    """
    from matplotlib import rc_context

    target = StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        _, labels = axes.get_legend_handles_labels()
        if labels:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(labels), 3), columnspacing=1.4)
        for written in axes.texts:  # names of lines, which have no style yet
            written.set(color=INK, fontfamily=STYLE["font.family"])
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    text = target.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers its groups afresh in every figure; one page holds several.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(THEME), lambda colour: THEME[colour.group()], text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
