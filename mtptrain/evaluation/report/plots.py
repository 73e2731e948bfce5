"""The figures of an evaluation, and of the checkpoints of a run, as inline SVG."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mtptrain.evaluation.curve import Curve
from mtptrain.evaluation.head_result import Bucket, BucketKind, HeadResult
from mtptrain.evaluation.report.breakdown_tables import KIND_TITLES, reached_buckets
from mtptrain.evaluation.report.drawing import (
    COLOURS,
    INK,
    canvas,
    draw_series,
    draw_spans,
    name_rows,
    step_canvas,
    svg,
    tick,
)
from mtptrain.evaluation.result import Evaluation

if TYPE_CHECKING:  # a third of a second of every start, and drawn once at the end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DODGE = 0.06  # of one K, so that the intervals of two heads stand side by side


def acceptance_by_position(evaluation: Evaluation) -> str:
    """Draw the share of drafts kept at each position once all before it were, at the longest K."""
    length = evaluation.draft_length
    figure, axes = canvas(f"position k in the draft (K = {length})", "share accepted", length)
    for offset, head in _dodged(evaluation):
        shares = [float("nan") if share is None else share for share in head.replay[length].conditional]
        draw_series(axes, head.name, [k + offset for k in range(1, length + 1)], shares)
    axes.set_ylim(0, 1.02)
    return svg(figure, axes, "position", "Acceptance by draft position")


def acceptance_length(evaluation: Evaluation) -> str:
    """Draw tokens a pass against K, with 95 % intervals and the ceiling K+1."""
    longest = evaluation.draft_length
    figure, axes = canvas("draft length K", "tokens a pass", longest)
    top = 1.0
    for offset, head in _dodged(evaluation):
        known = {k + offset: one for k, one in head.replay.items() if one.acceptance_length is not None}
        spans = [one.interval for one in known.values() if one.interval is not None]
        lengths = [one.acceptance_length for one in known.values() if one.acceptance_length is not None]
        draw_spans(axes, head.name, list(known), spans)
        draw_series(axes, head.name, list(known), lengths)
        top = max([top, *(high for _, high in spans)])
    edges = [0.5, longest + 0.5]
    axes.plot(edges, [edge + 1 for edge in edges], color=INK, linewidth=1, linestyle="--", label="ceiling K+1")
    # The ceiling of a long draft lies far above the measured lengths: let it leave the frame.
    axes.set_ylim(1, min(longest + 1.2, max(2.2, 1 + (top - 1) * 1.4)))
    return svg(figure, axes, "length", "Acceptance length against draft length")


def gain(evaluation: Evaluation) -> str | None:
    """Draw trained minus stock acceptance length against K, with 95 % intervals; None without two heads."""
    known = {k: gain for k, gain in (evaluation.gain or {}).items() if gain is not None}
    if not known:
        return None
    xs, gains = list(known), list(known.values())
    figure, axes = canvas("draft length K", "gain, tokens a pass", max(xs))
    axes.axhline(0, color=INK, linewidth=1, linestyle="--", label="no gain")
    draw_spans(axes, "trained", xs, [one.interval for one in gains])
    draw_series(axes, "trained", xs, [one.gain for one in gains], label="trained - stock")
    axes.margins(y=0.15)
    return svg(figure, axes, "gain", "Gain of the trained head over the stock head")


def speedup(evaluation: Evaluation) -> str:
    """Draw tokens/s over plain decoding against K at the smallest batch: median, quartiles, batches, prediction."""
    figure, axes = canvas("draft length K", "speed-up over plain", evaluation.draft_length)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="break-even")
    batch = evaluation.first_batch
    for offset, head in _dodged(evaluation):
        name, measured = head.name, evaluation.speedup[batch][head.name]
        xs = [k + offset for k in measured]
        for x, one in zip(xs, measured.values(), strict=True):
            axes.plot([x] * len(one.per_batch), one.per_batch, ".", color=COLOURS[name], alpha=0.35, markersize=4)
        draw_spans(axes, name, xs, [one.quartiles for one in measured.values()])
        draw_series(axes, name, xs, [one.median for one in measured.values()])
        predicted = [evaluation.steps[batch][name].predicted_speedup[k].median for k in measured]
        label = "predicted" if head is evaluation.heads[0] else None
        axes.plot(xs, predicted, "_", color=COLOURS[name], markersize=11, label=label)
    axes.margins(y=0.15)
    return svg(figure, axes, "speedup", "Speed-up on the clock against draft length")


def batch_speedup(evaluation: Evaluation) -> str | None:
    """Draw the last head's speed-up against the batch, a line a K, with break-even; None with one batch size."""
    sizes = sorted(evaluation.speedup)
    if len(sizes) < 2:
        return None
    name = evaluation.last_head.name
    figure, axes = canvas("batch", f"speed-up of the {name} head", 1)
    axes.set(xlim=(-0.5, len(sizes) - 0.5), xticks=range(len(sizes)), xticklabels=sizes)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="break-even")
    for length in evaluation.draft_lengths:
        medians = [evaluation.speedup[size][name][length].median for size in sizes]
        strength = 0.35 + 0.65 * length / evaluation.draft_length
        axes.plot(range(len(sizes)), medians, marker="o", markersize=4, color=COLOURS[name], alpha=strength)
        end = (len(sizes) - 1, medians[-1])
        axes.annotate(f"K={length}", end, xytext=(5, -3), textcoords="offset points", fontsize=8)
    axes.margins(y=0.15)
    return svg(figure, axes, "batches", "Speed-up on the clock against the batch")


def acceptance_by_step(curve: Curve) -> str:
    """Draw tokens a pass against training steps, a line a K, with the stock head and 95 % intervals at the last.

    Args:
        curve: with at least one point.
    """
    longest = curve.identity.draft_length
    figure, axes = step_canvas("tokens a pass", curve.points[0].step, curve.points[-1].step)
    for length in curve.draft_lengths:
        known = [(point.step, one) for point in curve.points if (one := point.replay[length]).acceptance_length]
        lengths = [one.acceptance_length for _, one in known if one.acceptance_length is not None]
        strength = 0.35 + 0.65 * length / longest
        axes.plot(
            [step for step, _ in known], lengths, marker="s", markersize=4, color=COLOURS["trained"], alpha=strength
        )
        if known:
            end = (known[-1][0], lengths[-1])
            axes.annotate(f"K={length}", end, xytext=(5, -3), textcoords="offset points", fontsize=8)
        if length == longest:
            draw_spans(axes, "trained", [step for step, _ in known], [one.interval for _, one in known if one.interval])
    stock = curve.stock[longest].acceptance_length if curve.stock else None
    if stock is not None:
        axes.axhline(stock, color=COLOURS["stock"], linewidth=1, linestyle="--", label=f"stock, K={longest}")
    axes.margins(y=0.15)
    return svg(figure, axes, "steps", "Acceptance length against training steps")


def calibration(evaluation: Evaluation) -> str:
    """Draw acceptance of drafted tokens against the head's confidence in them, with the diagonal."""
    figure, axes = canvas("head's confidence", "share accepted", 1)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="calibrated")
    for head in evaluation.heads:
        bins = head.calibration.bins
        draw_series(axes, head.name, [one.confidence for one in bins], [one.acceptance for one in bins])
    return svg(figure, axes, "calibration", "Acceptance against the head's confidence")


def losses(evaluation: Evaluation) -> str:
    """Draw the share of the lost drafted tokens by class of the text's token, a bar a head."""
    kind = BucketKind.token_class
    figure, axes = _bars(evaluation, kind, lambda bucket: bucket.lost_share, "share of the lost tokens")
    return svg(figure, axes, "losses", "Where drafted tokens are lost")


def acceptance_by(evaluation: Evaluation, kind: BucketKind) -> str | None:
    """Draw the share accepted of the drafted tokens in each bucket of a kind, a bar a head; None with one bucket."""
    if len(reached_buckets(evaluation, kind)) < 2:
        return None
    figure, axes = _bars(evaluation, kind, lambda bucket: bucket.acceptance, "share accepted")
    axes.set(xlim=(0, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1])
    return svg(figure, axes, f"by-{kind.value}", f"Acceptance by {KIND_TITLES[kind]}")


def _bars(
    evaluation: Evaluation, kind: BucketKind, figure_of: Callable[[Bucket], float], x_label: str
) -> tuple[Figure, Axes]:
    """Return horizontal bars of one figure, a group a bucket, the first at the top."""
    from matplotlib.ticker import MaxNLocator

    heads, names = evaluation.heads, reached_buckets(evaluation, kind)
    figure, axes = canvas(x_label, "", 1)
    figure.set_figheight(1.2 + 0.16 * (1 + len(heads)) * len(names))
    height = 0.8 / len(heads)
    for number, head in enumerate(heads):
        shares = {bucket.bucket: figure_of(bucket) for bucket in head.breakdown.by.get(kind, [])}
        ys = [y + (number - (len(heads) - 1) / 2) * height for y in range(len(names))]
        widths = [shares.get(name, 0.0) for name in names]
        axes.barh(ys, widths, height * 0.92, color=COLOURS[head.name], label=head.name)
    name_rows(axes, [tick(name) for name in names])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    return figure, axes


def _dodged(evaluation: Evaluation) -> list[tuple[float, HeadResult]]:
    """Return each head with its offset in K."""
    middle = (len(evaluation.heads) - 1) / 2
    return [((number - middle) * 2 * DODGE, head) for number, head in enumerate(evaluation.heads)]
