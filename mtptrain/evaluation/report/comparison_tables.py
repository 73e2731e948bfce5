"""Tables of a comparison: acceptance length and gain by draft length, by position and by domain, and settings."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from mtptrain.evaluation.comparison_result import ComparedHead, Comparison, HeadComparison, PromptGains
from mtptrain.evaluation.head_result import Gain, span
from mtptrain.evaluation.report.tables import (
    MISSING_VALUE,
    Cell,
    Grid,
    gain_cell,
    length_cell,
    share_cell,
)

DETECTABLE = "the smallest true difference that these prompts would have shown with 80 % power"


def gain_table(comparison: Comparison) -> Grid:
    """Return the acceptance length of every head, and the gain of every head over the first, by K."""
    headers = ["K", *(f"{head.letter}\ntok/pass" for head in comparison.heads)]
    headers += [f"{letters(one)}\ngain" for one in comparison.comparisons]
    headers += [f"{letters(one)}\nwould show" for one in comparison.comparisons]
    rows = []
    for length in range(1, comparison.draft_length + 1):
        gains = [one.gain[length] for one in comparison.comparisons]
        row = [Cell(str(length)), *(length_cell(head.replay[length]) for head in comparison.heads)]
        rows.append([*row, *map(gain_cell, gains), *map(_detectable, gains)])
    note = (
        f"tok/pass: tokens a pass (acceptance length), by replay, {_sources(comparison)}. Gain: the "
        f"paired difference on the same texts. Would show: {DETECTABLE}."
    )
    return Grid("Acceptance length and gain by draft length K", headers, rows, note)


def _sources(comparison: Comparison) -> str:
    """Return the sources of variation that the intervals hold; one group of prompts has none that is known."""
    prompts = comparison.prompts
    if prompts.conversations == 1:
        return prompts.interval_text
    runs = "runs and " if any(len(head.runs) > 1 for head in comparison.heads) else ""
    return f"with 95 % intervals over {runs}{prompts.count_text}"


def _detectable(gain: Gain | None) -> Cell:
    return Cell(MISSING_VALUE if gain is None else f"{gain.detectable:.2f}")


def position_gain_table(comparison: Comparison) -> Grid:
    """Return the conditional acceptance of every head, and the gain of every head over the first, by position."""
    length = comparison.draft_length
    headers = ["k", *(f"{head.letter}\naccepted" for head in comparison.heads)]
    headers += [f"{letters(one)}\ngain" for one in comparison.comparisons]
    rows = []
    for k in range(length):
        shares = [share_cell(head.replay[length].conditional[k]) for head in comparison.heads]
        gains = [_share_gain(one.gain_by_position[k]) for one in comparison.comparisons]
        rows.append([Cell(str(k + 1)), *shares, *gains])
    note = (
        f"Accepted: share of drafts kept at this position once all before it were, K={length}. "
        f"{MISSING_VALUE}: too few drafts reached it."
    )
    return Grid("Acceptance and gain by draft position", headers, rows, note)


def _share_gain(gain: Gain | None) -> Cell:
    if gain is None:
        return Cell(MISSING_VALUE)
    low, high = gain.interval
    return Cell(f"{gain.gain:+.3f}", f"{low:+.3f} to {high:+.3f}")


def domain_gain_table(comparison: Comparison) -> Grid | None:
    """Return acceptance length and gain in each domain at the longest K; None with one domain."""
    domains, length = list(comparison.heads[0].domains), comparison.draft_length
    if len(domains) < 2:
        return None
    headers = ["domain", "prompts", *(f"{head.letter}\ntok/pass" for head in comparison.heads)]
    headers += [f"{letters(one)}\ngain" for one in comparison.comparisons]
    rows = []
    for domain in domains:
        gains = [one.domains[domain] for one in comparison.comparisons]
        cells = [length_cell(head.domains[domain]) for head in comparison.heads]
        rows.append([Cell(domain), _prompts(gains), *cells, *(_domain_gain(one, length) for one in gains)])
    note = (
        f"K={length}; 95 % intervals. WORSE: the interval lies below 0. {MISSING_VALUE}: its texts end at their first "
        "token, without a verify pass."
    )
    return Grid("Acceptance length and gain by domain", headers, rows, note)


def _prompts(gains: list[PromptGains | None]) -> Cell:
    known = [one.prompts for one in gains if one is not None]
    return Cell(str(known[0]) if known else MISSING_VALUE)


def _domain_gain(gains: PromptGains | None, length: int) -> Cell:
    gain = None if gains is None else gains.gain[length]
    if gain is not None and gain.is_clear_loss:
        return Cell(f"WORSE {gain.gain:+.2f}", span(gain.interval, signed=True))
    return gain_cell(gain)


def difference_table(comparison: Comparison) -> Grid | None:
    """Return the training settings that are not the same in all runs; None if all agree or one head was trained."""
    if not comparison.differences:
        return None
    headers = ["setting", *(head.letter for head in comparison.heads)]
    rows = [
        [Cell(one.name), *(Cell(MISSING_VALUE if value is None else value) for value in one.values)]
        for one in comparison.differences
    ]
    note = f"Settings that change the result of a training. {MISSING_VALUE}: not trained here."
    return Grid("Settings that differ", headers, rows, note)


def run_table(comparison: Comparison) -> Grid | None:
    """Return the acceptance length of every run at the longest K; None if no setting has several."""
    if all(len(head.runs) == 1 for head in comparison.heads):
        return None
    length = comparison.draft_length
    rows = [
        [Cell(f"{head.letter}  {run.checkpoint}"), _length(run.acceptance_length[length])]
        for head in comparison.heads
        for run in head.runs
    ]
    return Grid("Runs", ["run", f"tok/pass\nK={length}"], rows, "A setting's figure is the mean of its runs.")


def _length(value: float | None) -> Cell:
    return Cell(MISSING_VALUE if value is None else f"{value:.3f}")


def letters(one: HeadComparison) -> str:
    """Return `B - A` of a comparison of B with A."""
    return f"{_letter(one.other)} - {_letter(one.base)}"


def _letter(name: str) -> str:
    return name.partition(" ")[0]


def describe_head(head: ComparedHead) -> str:
    """Return the checkpoints of a setting and their form, in words."""
    return f"{head.shown} ({head.mode}, depth {head.depth}, {head.parameters:,} parameters)"
