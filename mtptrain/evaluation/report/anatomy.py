"""Where acceptance comes from and where it is lost, as grids: kinds of token, domains, thresholds, step times."""

from __future__ import annotations

from typing import Any

from mtptrain.evaluation.report.table import MISSING_VALUE, Cell, Grid, draft_lengths, first_batch, span

KINDS = {
    "token_class": "class of the text's token",
    "entropy": "the backbone's entropy there, nats",
    "context": "tokens of context",
    "generated": "tokens generated before",
    "domain": "domain",
}


def breakdown_grids(evaluation: dict[str, Any]) -> list[Grid]:
    """A grid for each kind that has more than one bucket: acceptance and share of the lost tokens, head by head."""
    return [grid for kind, title in KINDS.items() if len((grid := _breakdown_grid(evaluation, kind, title)).rows) > 1]


def _breakdown_grid(evaluation: dict[str, Any], kind: str, title: str) -> Grid:
    heads = evaluation["heads"]
    found = [{row["bucket"]: row for row in head["breakdown"]["by"].get(kind, [])} for head in heads]
    parts = [("verified", "reached"), ("accepted", "acceptance"), ("share of loss", "lost_share")]
    headers = [title, *(f"{head['name']}\n{name}" for head in heads for name, _ in parts)]
    rows = [
        [Cell(bucket), *(_share(rows_of.get(bucket), field) for rows_of in found for _, field in parts)]
        for bucket in dict.fromkeys(bucket for rows_of in found for bucket in rows_of)
    ]
    note = (
        f"Verified: drafted tokens that decoding verifies at K={draft_lengths(evaluation)[-1]}. Accepted: their share. "
        "Share of loss: of all drafted tokens that misses cost, the miss itself and the draft after it."
    )
    return Grid(f"Acceptance by {title}", headers, rows, note)


def _share(row: dict[str, Any] | None, field: str) -> Cell:
    if row is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{row[field]:,.0f}" if field == "reached" else f"{row[field]:.3f}")


def domain_grid(evaluation: dict[str, Any]) -> Grid | None:
    """Acceptance length of each head in each domain at the longest K; None with one domain."""
    heads = evaluation["heads"]
    domains = list(heads[0]["domains"])
    if len(domains) < 2:
        return None
    gains = evaluation["gain_by_domain"] or {}
    headers = ["domain", *(f"{head['name']}\ntok/pass" for head in heads), *(["gain\ntok/pass"] if gains else [])]
    rows = []
    for domain in domains:
        measured = [head["domains"][domain] for head in heads]
        row = [Cell(domain), *(Cell(f"{one['acceptance_length']:.2f}", span(one["interval"])) for one in measured)]
        if gains:
            gain = gains[domain]
            row.append(Cell(f"{gain['gain']:+.2f}", span(gain["interval"], signed=True)))
        rows.append(row)
    note = f"K={draft_lengths(evaluation)[-1]}; 95 % bootstrap intervals over the prompts of the domain."
    return Grid("Acceptance length by domain", headers, rows, note)


def threshold_grid(evaluation: dict[str, Any]) -> Grid:
    """Acceptance length and drafted tokens a pass where drafts end at a confidence, head by head."""
    heads = evaluation["heads"]
    headers = ["confidence", *(f"{head['name']}\n{part}" for head in heads for part in ("tok/pass", "drafted/pass"))]
    rows = []
    for number, first in enumerate(heads[0]["thresholds"]):
        row = [Cell("no limit" if first["stop_below"] == 0 else f"{first['stop_below']:g}")]
        for head in heads:
            found = head["thresholds"][number]
            drafted = found["drafted_per_pass"]
            row.append(Cell(f"{found['acceptance_length']:.2f}"))
            row.append(Cell(MISSING_VALUE if drafted is None else f"{drafted:.2f}"))
        rows.append(row)
    note = (
        f"Drafts of up to K={draft_lengths(evaluation)[-1]} tokens that end before a step whose largest head "
        "probability is below the confidence (decoding.min_confidence), by replay."
    )
    return Grid("Drafts stopped by the head's confidence", headers, rows, note)


def step_grid(evaluation: dict[str, Any]) -> Grid:
    """Measured times of a verify pass and a draft by K, and the speed-up that they predict, head by head."""
    batch = first_batch(evaluation)
    times = evaluation["steps"][batch]
    names = list(times)
    parts = ("verify ms", "draft ms", "predicted")
    headers = ["K", *(f"{name}\n{part}" for name in names for part in parts)]
    rows = []
    for length in draft_lengths(evaluation):
        row = [Cell(length)]
        for name in names:
            found = times[name]
            row.append(_milliseconds(found["step_seconds"][str(int(length) + 1)]))
            row.append(_milliseconds(found["draft_seconds"][length]))
            predicted = found["predicted_speedup"][length]
            row.append(Cell(f"{predicted['median']:.2f}x", span(predicted["quartiles"])))
        rows.append(row)
    first = times[names[0]]
    note = (
        f"A verify pass runs K+1 tokens; one of a single token takes {_milliseconds(first['step_seconds']['1']).value} "
        "ms. Predicted: tokens a pass of the batch times the time of a one-token pass, over the time of verifying and "
        f"drafting; medians and quartiles of {first['repetitions']} interleaved repetitions at batch {first['batch']}, "
        f"context {first['context']}."
    )
    return Grid("Times of the steps and the speed-up they predict", headers, rows, note)


def _milliseconds(spread: dict[str, Any]) -> Cell:
    low, high = spread["quartiles"]
    return Cell(f"{1000 * spread['median']:.2f}", f"{1000 * low:.2f} to {1000 * high:.2f}")


def share_grid(evaluation: dict[str, Any]) -> Grid:
    """Speed-up and where the time of speculative decoding goes, of the last head by batch and K."""
    name = evaluation["heads"][-1]["name"]
    phases = ("prefill", "draft", "verify", "sample", "rewind")
    headers = ["batch, K", "speed-up", "after prefill", "predicted", *phases]
    rows = []
    for batch, heads in evaluation["speedup"].items():
        for length in draft_lengths(evaluation):
            found = heads[name][length]
            predicted = evaluation["steps"][batch][name]["predicted_speedup"][length]
            rows.append(
                [
                    Cell(f"{batch}, {length}"),
                    Cell(f"{found['median']:.2f}x", span(found["quartiles"])),
                    Cell(f"{found['after_prefill']['median']:.2f}x", span(found["after_prefill"]["quartiles"])),
                    Cell(f"{predicted['median']:.2f}x", span(predicted["quartiles"])),
                    *(Cell(f"{100 * found['shares'][phase]:.0f} %") for phase in phases),
                ]
            )
    note = (
        f"The {name} head: tokens/s over plain decoding on the clock, with and without the prefill; what the times of "
        "single steps and the passes that the batch needed predict, without it; and the share of the wall time "
        "spent in each phase; the rest is bookkeeping."
    )
    return Grid("Speed-up by batch, and where the time goes", headers, rows, note)
