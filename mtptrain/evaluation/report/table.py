"""The measured figures in words and small grids, for the terminal and for the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# K draft length, k position in the draft from 1.

MISSING_VALUE = "-"
SHOWN_DETAILS = 10


class Outcome(Enum):
    """What the run says about the trained head."""

    gain = "gain"
    unclear = "unclear"  # the interval of the gain covers 0
    loss = "loss"
    single = "single"  # one head only, nothing to compare
    failed = "failed"  # the certificate did not pass, so no figure counts


OUTCOME_STYLES = {
    Outcome.gain: "bold green",
    Outcome.unclear: "bold yellow",
    Outcome.loss: "bold red",
    Outcome.single: "bold",
    Outcome.failed: "bold red",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and, below it, its interval or quartiles."""

    value: str
    spread: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: a line break in a header stays one."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]
    note: str


def draft_lengths(evaluation: dict[str, Any]) -> list[str]:
    """The measured K from 1 to the longest, as the keys of the evaluation."""
    return [str(length) for length in range(1, evaluation["draft_length"] + 1)]


def first_batch(evaluation: dict[str, Any]) -> str:
    """The smallest batch that was timed, as the key of the evaluation."""
    return str(min(int(size) for size in evaluation["speedup"]))


def measured_speedup(evaluation: dict[str, Any], head: str, length: str) -> dict[str, Any] | None:
    """Speed-up of one head at one K and the smallest batch; None where it was not timed."""
    return evaluation["speedup"][first_batch(evaluation)].get(head, {}).get(length)


def measured_gain(evaluation: dict[str, Any], length: str) -> dict[str, Any] | None:
    """Gain of the trained head over the stock head at one K; None where there is nothing to compare."""
    return (evaluation["gain"] or {}).get(length)


def outcome(evaluation: dict[str, Any]) -> Outcome:
    """What the longest K says: it is fixed before measuring, so no best of several is picked."""
    gain = measured_gain(evaluation, draft_lengths(evaluation)[-1])
    if not evaluation["certificate"]["passed"]:
        return Outcome.failed
    if gain is None:
        return Outcome.single
    low, high = gain["interval"]
    if low > 0:
        return Outcome.gain
    return Outcome.loss if high < 0 else Outcome.unclear


def verdict(evaluation: dict[str, Any]) -> str:
    """One sentence: acceptance length of the last head at the longest K and whether it gains on stock."""
    length = draft_lengths(evaluation)[-1]
    head = evaluation["heads"][-1]
    measured = head["replay"][length]
    warning = "CERTIFICATE FAILED, these figures do not count: " if outcome(evaluation) is Outcome.failed else ""
    lead = (
        f"{warning}{head['name']} head: {measured['acceptance_length']:.2f} tokens a verify pass at K={length} "
        f"({span(measured['interval'])})"
    )
    gain = measured_gain(evaluation, length)
    return lead + (f", {_gain_in_words(gain)}" if gain else ", with no other head to compare")


def _gain_in_words(gain: dict[str, Any]) -> str:
    value, (low, high) = gain["gain"], gain["interval"]
    interval = f"({span((low, high), signed=True)})"
    if low > 0:
        return f"{value:+.2f} over stock {interval}"
    if high < 0:
        return f"a loss of {abs(value):.2f} against stock {interval}"
    return f"no evidence of a gain over stock: {value:+.2f} {interval}"


def clock_verdict(evaluation: dict[str, Any]) -> str:
    """One sentence: the best speed-up of the last head over plain decoding, or that there is none."""
    name = evaluation["heads"][-1]["name"]
    timed = {k: found for k in draft_lengths(evaluation) if (found := measured_speedup(evaluation, name, k))}
    if not timed:
        return "on the clock: not measured"
    best = max(timed, key=lambda length: timed[length]["median"])
    figure = f"{timed[best]['median']:.2f}x at K={best} (quartiles {span(timed[best]['quartiles'])})"
    batch = first_batch(evaluation)
    plain = f"plain decoding, {evaluation['plain_tokens_per_second'][batch]:,.1f} tokens/s at batch {batch}"
    if timed[best]["median"] > 1:
        return f"on the clock: {figure} against {plain}" + ("; the fastest of the K measured" if len(timed) > 1 else "")
    return f"on the clock: no K is faster than {plain}; the best is {figure}"


def span(pair: Any, signed: bool = False) -> str:
    """`low to high` with two decimals."""
    low, high = pair
    return f"{low:+.2f} to {high:+.2f}" if signed else f"{low:.2f} to {high:.2f}"


def length_grid(evaluation: dict[str, Any]) -> Grid:
    """Per K: acceptance length and speed-up of each head, and the gain."""
    names = [head["name"] for head in evaluation["heads"]]
    gains = ["gain\ntok/pass"] if evaluation["gain"] else []
    headers = ["K", *(f"{name}\ntok/pass" for name in names), *gains, *(f"{name}\nspeed-up" for name in names)]
    rows = []
    for length in draft_lengths(evaluation):
        row = [Cell(length), *(_length_cell(head["replay"].get(length)) for head in evaluation["heads"])]
        if gains:
            row.append(_gain_cell(measured_gain(evaluation, length)))
        rows.append(row + [_speedup_cell(measured_speedup(evaluation, name, length)) for name in names])
    note = (
        f"tok/pass: tokens a verify pass, 95 % bootstrap interval over {evaluation['prompts']['count']} prompts. "
        "Speed-up: tokens/s over plain decoding, median and quartiles of the timed batches of "
        f"{first_batch(evaluation)}."
    )
    return Grid("Acceptance length and speed-up by draft length K", headers, rows, note)


def _length_cell(measured: dict[str, Any] | None) -> Cell:
    if measured is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{measured['acceptance_length']:.2f}", span(measured["interval"]))


def _gain_cell(measured: dict[str, Any] | None) -> Cell:
    if measured is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{measured['gain']:+.2f}", span(measured["interval"], signed=True))


def _speedup_cell(measured: dict[str, Any] | None) -> Cell:
    if measured is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{measured['median']:.2f}x", span(measured["quartiles"]))


def position_grid(evaluation: dict[str, Any]) -> Grid:
    """Per position: acceptance while decoding at the longest K, and overlap and top-1 on held-out text."""
    length = draft_lengths(evaluation)[-1]
    columns: dict[str, list[float | None]] = {}
    heads = evaluation["heads"]
    columns |= {f"{head['name']}\naccepted": head["replay"][length]["conditional"] for head in heads}
    columns |= {f"{head['name']}\nalpha": head["teacher_forced"]["alpha"] for head in heads}
    columns |= {f"{head['name']}\ntop-1": head["teacher_forced"]["top1"] for head in heads}
    rows = [
        [Cell(str(position + 1)), *(_share_cell(values, position) for values in columns.values())]
        for position in range(max(map(len, columns.values())))
    ]
    note = (
        f"Accepted: share of drafts kept at this position once all before it were, K={length}. "
        "Alpha: overlap with the backbone's distribution on held-out text; top-1: same first choice. "
        f"{MISSING_VALUE}: not measured."
    )
    return Grid("Acceptance by draft position", ["k", *columns], rows, note)


def _share_cell(values: list[float | None], position: int) -> Cell:
    value = values[position] if position < len(values) else None
    return Cell(MISSING_VALUE if value is None else f"{value:.3f}")


def backbone_line(evaluation: dict[str, Any]) -> str:
    """One line: how well the frozen backbone predicts held-out text."""
    backbone = evaluation["backbone"]
    return (
        f"backbone {backbone['name']}: held-out loss {backbone['heldout_nats_per_token']:.3f} nats/token, "
        f"{backbone['heldout_bits_per_byte']:.3f} bits/byte"
    )


def certificate_line(evaluation: dict[str, Any]) -> str:
    """One line: how much agreed, and whether the sampler and the controls did what they must."""
    certificate = evaluation["certificate"]
    greedy, replay, law = (certificate.get(name) for name in ("greedy_identity", "replay_equals_loop", "replay_law"))
    ties = greedy["near_ties"]
    tie_text = f" ({len(ties)} near tie{'s' * (len(ties) > 1)})" if ties else ""
    parts = [
        f"output identical to plain greedy {greedy['identical']}/{greedy['compared']}{tie_text}",
        f"replay = loop {replay['equal']}/{replay['compared']}",
    ]
    if law is not None:
        parts.append(f"sampled loops follow replay's law {_word(law)} ({len(law['tests'])} tests)")
    parts.append(f"sampler {_word(certificate['sampler'])}")
    parts.append(f"controls {_word(certificate['controls'])}")
    return "; ".join(parts)


def _word(part: dict[str, Any]) -> str:
    return "passed" if part["passed"] else "FAILED"


def certificate_details(evaluation: dict[str, Any]) -> list[str]:
    """A line for each difference and failed test, then for each near tie."""
    certificate = evaluation["certificate"]
    greedy, replay = certificate["greedy_identity"], certificate["replay_equals_loop"]
    lines = [f"{_place(found)}: other token than plain greedy {_gap(found)}" for found in greedy["differences"]]
    lines += [
        f"{_place(found)}: {found['loop_passes']} passes in the loop, {found['replay_passes']} in the replay"
        for found in replay["differences"]
    ]
    law = certificate.get("replay_law", {"passed": True, "tests": []})
    if not law["passed"]:
        lines += [
            f"{test['head']} head, K={test['draft_length']}: {test['passes']} passes in the loop, "
            f"{test['expected']:.1f} expected, p={test['p_value']:.1e}"
            for test in law["tests"]
        ]
    sampler = certificate["sampler"]
    lines += [
        f"sampler, {name} verification: chi-square {sampler[name]['statistic']:.1f} at {sampler[name]['dof']} degrees "
        f"of freedom, p={sampler[name]['p_value']:.1e}"
        for name in ("token", "block")
        if not sampler[name]["passed"]
    ]
    lines += [
        f"control {name} failed"
        for name, found in certificate["controls"].items()
        if name != "passed" and not found["passed"]
    ]
    return lines + [f"{_place(found)}: near tie {_gap(found)}" for found in greedy["near_ties"]]


def _place(found: dict[str, Any]) -> str:
    return f"{found['head']} head, prompt {found['prompt']}, K={found['draft_length']}"


def _gap(found: dict[str, Any]) -> str:
    return f"at position {found['position']}, logit gap {found['gap']:.1e}"


def print_summary(evaluation: dict[str, Any], console: Console) -> None:
    """Print the verdict, the two grids, the backbone's loss and the certificate.

    Args:
        evaluation: content of evaluation.json.
        console: where to; made for 80 columns or more.
    """
    console.print(Text(verdict(evaluation), style=OUTCOME_STYLES[outcome(evaluation)]))
    console.print(Text(clock_verdict(evaluation)))
    for grid in (length_grid(evaluation), position_grid(evaluation)):
        console.print(Text(f"\n{grid.title}", style="bold"))
        console.print(_rich_table(grid))
        console.print(Text(grid.note, style="dim"))
    console.print()
    console.print(Text(backbone_line(evaluation)))
    _print_certificate(evaluation, console)


def _rich_table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in grid.headers:
        table.add_column(Text(header), justify="right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(_rich_cell(cell) for cell in row))
    return table


def _rich_cell(cell: Cell) -> Text:
    return Text.assemble(cell.value, ("\n" + cell.spread, "dim")) if cell.spread else Text(cell.value)


def _print_certificate(evaluation: dict[str, Any], console: Console) -> None:
    line = certificate_line(evaluation)
    if evaluation["certificate"]["passed"]:
        console.print(Text.assemble(("certificate passed: ", "green"), line))
        return
    console.print(Text.assemble(("CERTIFICATE FAILED:", "bold white on red"), (f" {line}", "bold red")))
    details = certificate_details(evaluation)
    for detail in details[:SHOWN_DETAILS]:
        console.print(Text(f"- {detail}", style="red"))
    if len(details) > SHOWN_DETAILS:
        console.print(Text(f"- and {len(details) - SHOWN_DETAILS} more in evaluation.json", style="red"))
