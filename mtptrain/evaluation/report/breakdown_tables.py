"""Tables that only the page shows: acceptance by kind of token and by confidence, step times, counts."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields

from mtptrain.config import PastDepth
from mtptrain.evaluation.head_result import Acceptance, Bucket, BucketKind, Totals
from mtptrain.evaluation.report.tables import (
    MISSING_VALUE,
    Cell,
    Grid,
    ratio_cell,
    share_cell,
    speed_cell,
)
from mtptrain.evaluation.result import Evaluation, Spread, StepLatency, TimeShares

KIND_TITLES = {
    BucketKind.token_class: "class of the text's token",
    BucketKind.entropy: "the backbone's entropy there, nats",
    BucketKind.context: "tokens of context",
    BucketKind.generated: "tokens generated before",
    BucketKind.domain: "domain",
}


def reached_buckets(evaluation: Evaluation, kind: BucketKind) -> list[str]:
    """Return the names of the buckets that any head reached, in their order."""
    rows = [row for head in evaluation.heads for row in head.breakdown.by.get(kind, [])]
    return list(dict.fromkeys(row.bucket for row in rows))


def breakdown_tables(evaluation: Evaluation) -> list[Grid]:
    """Return a table for each kind with more than one bucket: acceptance and share of the lost tokens by head."""
    return [_breakdown_table(evaluation, kind) for kind in KIND_TITLES if len(reached_buckets(evaluation, kind)) > 1]


def _breakdown_table(evaluation: Evaluation, kind: BucketKind) -> Grid:
    title, parts = KIND_TITLES[kind], ("verified", "accepted", "share of loss")
    headers = [title, *(f"{head.name}\n{part}" for head in evaluation.heads for part in parts)]
    by_head = [{row.bucket: row for row in head.breakdown.by.get(kind, [])} for head in evaluation.heads]
    rows = [
        [Cell(name), *(cell for buckets in by_head for cell in _bucket_cells(buckets.get(name)))]
        for name in reached_buckets(evaluation, kind)
    ]
    note = (
        f"Verified: drafted tokens that decoding verifies at K={evaluation.draft_length}. Accepted: the share of them "
        "that it keeps. Share of loss: of all drafted tokens that misses cost, the miss itself and the draft after it."
    )
    return Grid(f"Acceptance by {title}", headers, rows, note)


def _bucket_cells(bucket: Bucket | None) -> list[Cell]:
    if bucket is None:
        return [Cell(MISSING_VALUE)] * 3
    return [Cell(f"{bucket.reached:,.0f}"), share_cell(bucket.acceptance), share_cell(bucket.lost_share)]


def threshold_table(evaluation: Evaluation) -> Grid:
    """Return acceptance length and drafted tokens a pass of drafts that end below a confidence, by head."""
    heads = evaluation.heads
    headers = ["confidence", *(f"{head.name}\n{part}" for head in heads for part in ("tok/pass", "drafted/pass"))]
    rows = []
    for thresholds in zip(*(head.thresholds for head in heads), strict=True):
        limit = thresholds[0].min_confidence
        row = [Cell("no limit" if limit == 0 else f"{limit:g}")]
        for one in thresholds:
            drafted = one.drafted_per_pass
            row.append(Cell(f"{one.acceptance_length:.2f}"))
            row.append(Cell(MISSING_VALUE if drafted is None else f"{drafted:.2f}"))
        rows.append(row)
    note = (
        f"Drafts of up to K={evaluation.draft_length} tokens that end before a step whose largest head probability is "
        "below the confidence (decoding.min_confidence), by replay."
    )
    return Grid("Drafts that end below a confidence", headers, rows, note)


def step_table(evaluation: Evaluation) -> Grid:
    """Return the latency of a verify pass and of a draft by K, and the speed-up that they predict, by head."""
    steps = evaluation.steps[evaluation.first_batch]
    parts = ("verify ms", "draft ms", "predicted")
    headers = ["K", *(f"{name}\n{part}" for name in steps for part in parts)]
    rows = [
        [Cell(str(length)), *(cell for latency in steps.values() for cell in _step_cells(latency, length))]
        for length in evaluation.draft_lengths
    ]
    first = next(iter(steps.values()))
    note = (
        f"A verify pass runs K+1 tokens; a pass of a single token takes {_milliseconds(first.step_seconds[1]).value} "
        "ms. Predicted: tokens a pass of the batch times the time of a one-token pass, over the time of verifying and "
        f"drafting; medians and quartiles of {first.repetitions} interleaved repetitions at batch {first.batch}, "
        f"context {first.context}."
    )
    past_depth = evaluation.policy.past_depth
    if past_depth is not PastDepth.repeat_last and max(head.depth for head in evaluation.heads) > 1:
        note += f" Drafts past the depth are timed with the last module repeated, not as past_depth={past_depth.value}."
    return Grid("Latency of the steps and the speed-up they predict", headers, rows, note)


def _step_cells(latency: StepLatency, length: int) -> list[Cell]:
    return [
        _milliseconds(latency.step_seconds[length + 1]),
        _milliseconds(latency.draft_seconds[length]),
        ratio_cell(latency.predicted_speedup[length]),
    ]


def _milliseconds(seconds: Spread) -> Cell:
    low, high = seconds.quartiles
    return Cell(f"{1000 * seconds.median:.2f}", f"{1000 * low:.2f} to {1000 * high:.2f}")


def time_table(evaluation: Evaluation) -> Grid:
    """Return speed-up and shares of the wall time of the last head, by batch and K."""
    name = evaluation.last_head.name
    headers = ["batch, K", "speed-up", "after prefill", "predicted", *(phase.name for phase in fields(TimeShares))]
    rows = []
    for batch, heads in evaluation.speedup.items():
        for length in evaluation.draft_lengths:
            measured = heads[name][length]
            predicted = evaluation.steps[batch][name].predicted_speedup[length]
            ratios = [speed_cell(measured), ratio_cell(measured.after_prefill), ratio_cell(predicted)]
            shares = [Cell(f"{100 * share:.0f} %") for share in astuple(measured.shares)]
            rows.append([Cell(f"{batch}, {length}"), *ratios, *shares])
    note = (
        f"The {name} head. Speed-up: tokens/s over plain decoding on the clock, and the same without the prefill. "
        "Predicted: by the latency of single steps and the number of passes of this batch, without the prefill. "
        "Shares are of the wall time; the rest is bookkeeping."
    )
    return Grid("Speed-up by batch, and shares of the time", headers, rows, note)


def pass_table(evaluation: Evaluation) -> Grid:
    """Return passes, emitted tokens and acceptance length of the replay and of the real loop, by K."""
    sides = [(head, side) for head in evaluation.heads for side in ("replay", "loop")]
    parts = ("passes", "emitted", "length")
    headers = ["K", *(f"{head.name}\n{side}\n{part}" for head, side in sides for part in parts)]
    rows = []
    for length in evaluation.draft_lengths:
        totals = [total for head in evaluation.heads for total in (head.replay[length], head.loop[length])]
        rows.append([Cell(str(length)), *(cell for total in totals for cell in _total_cells(total))])
    note = "Length: acceptance length. Replay: all prompts. Loop: real decoding of the timed prompts."
    return Grid("Passes of the replay and of the loop", headers, rows, note)


def _total_cells(total: Totals | Acceptance) -> list[Cell]:
    return [_count_cell(value) for value in (total.passes, total.emitted, total.acceptance_length)]


def count_table(evaluation: Evaluation) -> Grid:
    """Return drafted, accepted, unconditional acceptance and held-out tokens at the longest K, by position."""
    length = evaluation.draft_length
    columns: dict[str, Sequence[float | None]] = {}
    for head in evaluation.heads:
        replay = head.replay[length]
        columns[f"{head.name}\ndrafted"] = replay.drafted
        columns[f"{head.name}\naccepted"] = replay.accepted
        columns[f"{head.name}\nunconditional"] = replay.unconditional
        columns[f"{head.name}\nheld-out tokens"] = head.teacher_forced.padded(length)[2]
    rows = [
        [Cell(str(position + 1)), *(_count_cell(values[position]) for values in columns.values())]
        for position in range(length)
    ]
    note = (
        f"Drafted, accepted, unconditional: replay at K={length}. Held-out tokens: the tokens behind alpha and top-1."
    )
    return Grid("Counts by draft position", ["k", *columns], rows, note)


def _count_cell(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
