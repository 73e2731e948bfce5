"""The figures of a comparison as inline SVG, a colour and a letter for every setting."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mtptrain.evaluation.comparison_result import Comparison
from mtptrain.evaluation.head_result import Gain, Interval
from mtptrain.evaluation.report.comparison_tables import letters
from mtptrain.evaluation.report.drawing import (
    INK,
    SERIES_MARKERS,
    canvas,
    draw_spans,
    name_rows,
    series_style,
    svg,
    tick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 0.16  # of one K, over which the settings stand side by side
SMALLEST = 0.02  # tokens a pass: equal heads differ by rounding, which no axis should magnify


def comparison_figures(comparison: Comparison) -> dict[str, str]:
    """Return the figures of a comparison that have data, by their captions."""
    drawn = {
        "Gain by draft length (95 % intervals)": gain_by_length(comparison),
        "Acceptance length (95 % intervals)": length_by_setting(comparison),
        "Gain in acceptance by position (95 % intervals)": gain_by_position(comparison),
        "Conditional acceptance by position": acceptance_by_setting(comparison),
        "Gain by domain (95 % intervals)": gain_by_domain(comparison),
    }
    return {caption: text for caption, text in drawn.items() if text is not None}


def gain_by_length(comparison: Comparison) -> str | None:
    """Draw the gain of every setting over the first against K; None without verify passes."""
    gains = [one.gain for one in comparison.comparisons]
    return _gains(comparison, gains, "draft length K", "gain, tokens a pass", "compared-gain")


def gain_by_position(comparison: Comparison) -> str | None:
    """Draw the gain in conditional acceptance against the position; None if no position was reached often enough."""
    gains = [dict(enumerate(one.gain_by_position, start=1)) for one in comparison.comparisons]
    label = f"position k in the draft (K = {comparison.draft_length})"
    return _gains(comparison, gains, label, "gain in acceptance", "compared-position-gain")


def _gains(
    comparison: Comparison, gains: Sequence[Mapping[int, Gain | None]], x_label: str, y_label: str, name: str
) -> str | None:
    figure, axes = canvas(x_label, y_label, comparison.draft_length)
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    is_empty = True
    for number, (one, by_x) in enumerate(zip(comparison.comparisons, gains, strict=True)):
        known = {x: gain for x, gain in by_x.items() if gain is not None}
        is_empty = is_empty and not known
        offset = _offset(number, len(gains))
        xs = [x + offset for x in known]
        _draw(axes, number + 1, xs, [gain.gain for gain in known.values()], letters(one))
        draw_spans(axes, str(series_style(number + 1)["color"]), xs, [gain.interval for gain in known.values()])
    axes.margins(y=0.15)
    return None if is_empty else svg(figure, axes, name, f"{y_label} against {x_label.partition(' (')[0]}")


def length_by_setting(comparison: Comparison) -> str:
    """Draw tokens a pass against K, a line a setting."""
    figure, axes = canvas("draft length K", "tokens a pass", comparison.draft_length)
    for number, head in enumerate(comparison.heads):
        offset = _offset(number, len(comparison.heads))
        known = {k + offset: one for k, one in head.replay.items()}
        spans: dict[float, Interval] = {x: one.interval for x, one in known.items() if one.interval is not None}
        values = {x: one.acceptance_length for x, one in known.items() if one.acceptance_length is not None}
        _draw(axes, number, list(values), list(values.values()), head.letter)
        draw_spans(axes, str(series_style(number)["color"]), list(spans), list(spans.values()))
    axes.margins(y=0.15)
    return svg(figure, axes, "compared-length", "Acceptance length against draft length")


def acceptance_by_setting(comparison: Comparison) -> str:
    """Draw the share of drafts kept at each position once all before it were, at the longest K."""
    length = comparison.draft_length
    figure, axes = canvas(f"position k in the draft (K = {length})", "share accepted", length)
    for number, head in enumerate(comparison.heads):
        offset = _offset(number, len(comparison.heads))
        shares = [float("nan") if share is None else share for share in head.replay[length].conditional]
        _draw(axes, number, [k + offset for k in range(1, length + 1)], shares, head.letter)
    axes.set_ylim(0, 1.02)
    return svg(figure, axes, "compared-position", "Acceptance by draft position")


def gain_by_domain(comparison: Comparison) -> str | None:
    """Draw the gain of every setting over the first in each domain, the first at the top; None with one domain."""
    domains, count = list(comparison.heads[0].domains), len(comparison.comparisons)
    if len(domains) < 2:
        return None
    figure, axes = canvas("gain, tokens a pass", "", 1)
    figure.set_figheight(1.2 + 0.16 * (1 + count) * len(domains))
    axes.axvline(0, color=INK, linewidth=1, linestyle="--")
    for number, one in enumerate(comparison.comparisons):
        ys, gains = [], []
        for y, domain in enumerate(domains):
            of_domain = one.domains[domain]
            gain = None if of_domain is None else of_domain.gain[comparison.draft_length]
            if gain is not None:
                ys.append(y + _offset(number, count))
                gains.append(gain)
        style = series_style(number + 1)
        low, high = [one.interval[0] for one in gains], [one.interval[1] for one in gains]
        axes.hlines(ys, low, high, color=style["color"], linewidth=2.5, alpha=0.55)
        marker = SERIES_MARKERS[(number + 1) % len(SERIES_MARKERS)]
        axes.plot([one.gain for one in gains], ys, marker, color=style["color"], label=letters(one), markersize=5)
    name_rows(axes, [tick(domain) for domain in domains])
    axes.margins(x=0.1)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -SMALLEST), max(right, SMALLEST))
    return svg(figure, axes, "compared-domains", "Gain by domain")


def _draw(axes: Axes, number: int, xs: Sequence[float], values: Sequence[float], label: str) -> None:
    marker = SERIES_MARKERS[number % len(SERIES_MARKERS)]
    axes.plot(xs, values, marker=marker, markersize=5, label=label, **series_style(number))


def _offset(number: int, count: int) -> float:
    """Return the place of one of several settings around a whole number."""
    return 0.0 if count == 1 else WIDTH * (number / (count - 1) - 0.5)
