"""Tables of acceptance length, by domain and by position too, and the summary that the terminal shows."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtptrain.config import DraftChoice
from mtptrain.evaluation.head_result import POSITION_METRICS, Acceptance, Gain, span
from mtptrain.evaluation.report.headline import (
    Headline,
    backbone_text,
    certificate_details,
    certificate_text,
    chosen_texts,
    doubts_text,
    headline,
    headline_text,
    seen_texts,
    speed_text,
)
from mtptrain.evaluation.result import Evaluation, Speedup, Spread
from mtptrain.run.tables import print_table

MISSING_VALUE, DOUBTFUL = "-", "? "
SHOWN_DETAILS = 10
STYLES = {
    Headline.gain: "bold green",
    Headline.unclear: "bold yellow",
    Headline.loss: "bold red",
    Headline.single: "bold",
    Headline.failed: "bold red",
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


def length_cell(measured: Acceptance | None) -> Cell:
    """Return an acceptance length above its interval."""
    if measured is None or measured.acceptance_length is None or measured.interval is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{measured.acceptance_length:.2f}", span(measured.interval))


def gain_cell(gain: Gain | None) -> Cell:
    """Return a gain above its interval, both with a sign."""
    if gain is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{gain.gain:+.2f}", span(gain.interval, signed=True))


def ratio_cell(ratio: Spread) -> Cell:
    """Return a speed-up above its quartiles."""
    return Cell(f"{ratio.median:.2f}x", span(ratio.quartiles))


def speed_cell(speed: Speedup) -> Cell:
    """Return a speed-up above the interval of its median; a mark stands before one that is doubtful."""
    return Cell(f"{DOUBTFUL * bool(speed.doubts)}{speed.median:.2f}x", span(speed.interval))


def share_cell(share: float | None) -> Cell:
    """Return a share with three decimals."""
    return Cell(MISSING_VALUE if share is None else f"{share:.3f}")


def length_table(evaluation: Evaluation) -> Grid:
    """Return the acceptance length of each head, and the gain, by K."""
    gains = evaluation.gain or {}
    gain_header = ["gain\ntok/pass"] if gains else []
    headers = ["K", *(f"{head.name}\ntok/pass" for head in evaluation.heads), *gain_header]
    rows = []
    for length in evaluation.draft_lengths:
        row = [Cell(str(length)), *(length_cell(head.replay[length]) for head in evaluation.heads)]
        rows.append([*row, gain_cell(gains[length])] if gains else row)
    note = f"tok/pass: tokens a pass (acceptance length), {evaluation.prompts.interval_text}."
    return Grid("Acceptance length by draft length K", headers, rows, note)


def drafts_table(evaluation: Evaluation) -> Grid | None:
    """Return the acceptance length of each head with sampled and with greedy drafts by K; None at temperature 0."""
    heads = [head for head in evaluation.heads if head.other_drafts is not None]
    if not heads:
        return None
    used = evaluation.policy.draft
    headers = ["K", *(f"{head.name}\n{choice.value}" for head in heads for choice in DraftChoice)]
    rows = []
    for length in evaluation.draft_lengths:
        row = [Cell(str(length))]
        for head in heads:
            other = (head.other_drafts or {}).get(length)
            row += [length_cell(head.replay[length] if choice is used else other) for choice in DraftChoice]
        rows.append(row)
    note = (
        f"tok/pass at temperature {evaluation.policy.temperature:g}, by the kind of draft; all other figures are of "
        f"{used.value} drafts. Servers draft greedily unless a switch is set (docs/export.md)."
    )
    return Grid("Sampled and greedy drafts", headers, rows, note)


def speed_table(evaluation: Evaluation) -> Grid:
    """Return the speed-up of each head on the clock, and in processor time on a CPU, at the shown batches."""
    heads, batches = [head.name for head in evaluation.heads], evaluation.shown_batches
    has_processor = all(
        evaluation.speedup[batch][name][length].processor is not None
        for batch in batches
        for name in heads
        for length in evaluation.draft_lengths
    )
    parts = ("speed-up", "processor") if has_processor else ("speed-up",)
    headers = ["batch", "K", *(f"{name}\n{part}" for name in heads for part in parts)]
    rows = []
    for batch in batches:
        for length in evaluation.draft_lengths:
            row = [Cell(str(batch)), Cell(str(length))]
            for name in heads:
                speed = evaluation.speedup[batch][name][length]
                row.append(speed_cell(speed))
                if has_processor and speed.processor is not None:
                    row.append(ratio_cell(speed.processor))
            rows.append(row)
    return Grid("Speed-up on the clock", headers, rows, _speed_note(evaluation, has_processor))


def _speed_note(evaluation: Evaluation, has_processor: bool) -> str:
    batches = evaluation.shown_batches
    confidence = sorted(
        {one.confidence for size in batches for k in evaluation.speedup[size].values() for one in k.values()}
    )
    shown = " or ".join(f"{100 * value:.0f} %" for value in confidence)
    return (
        f"Speed-up: tokens/s over plain decoding, median of the timed batches and its {shown} interval."
        + (" Processor: the same per second of processor time, median and quartiles." if has_processor else "")
        + (f" {DOUBTFUL.strip()}: doubtful, for the reason given above." if doubts_text(evaluation, batches) else "")
    )


def position_table(evaluation: Evaluation, metrics: Sequence[str] = tuple(POSITION_METRICS)) -> Grid:
    """Return some of `POSITION_METRICS` at the longest K, by position."""
    length = evaluation.draft_length
    heads = {head.name: head.by_position(length) for head in evaluation.heads}
    columns = {f"{head}\n{metric}": heads[head][metric] for metric in metrics for head in heads}
    rows = [
        [Cell(str(position + 1)), *(share_cell(shares[position]) for shares in columns.values())]
        for position in range(length)
    ]
    meanings = "; ".join(f"{metric.capitalize()}: {POSITION_METRICS[metric]}" for metric in metrics)
    note = f"{meanings}. K={length}. {MISSING_VALUE}: not measured."
    return Grid("Acceptance by draft position", ["k", *columns], rows, note)


def domain_table(evaluation: Evaluation) -> Grid | None:
    """Return the acceptance length of each head in each domain at the longest K; None with one domain."""
    heads, gains = evaluation.heads, evaluation.gain_by_domain or {}
    domains = list(heads[0].domains)
    if len(domains) < 2:
        return None
    headers = ["domain", *(f"{head.name}\ntok/pass" for head in heads), *(["gain\ntok/pass"] if gains else [])]
    rows = []
    for domain in domains:
        row = [Cell(domain), *(length_cell(head.domains[domain]) for head in heads)]
        rows.append([*row, gain_cell(gains[domain])] if gains else row)
    note = (
        f"K={evaluation.draft_length}; 95 % bootstrap intervals over the prompts of the domain. "
        f"{MISSING_VALUE}: its texts end at their first token, without a verify pass."
    )
    return Grid("Acceptance length by domain", headers, rows, note)


def summary_tables(evaluation: Evaluation) -> list[Grid]:
    """Return the tables of the terminal, which has room for three metrics by position."""
    positions = position_table(evaluation, tuple(POSITION_METRICS)[:3])
    lengths, domains = length_table(evaluation), domain_table(evaluation)
    tables = [lengths, domains, drafts_table(evaluation), speed_table(evaluation), positions]
    return [table for table in tables if table is not None]


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Print the headline, the tables, the backbone's loss and the certificate.

    Args:
        evaluation: the result.
        console: of 80 columns or more.
    """
    console.print(Text(headline_text(evaluation), style=STYLES[headline(evaluation)]))
    is_doubtful = bool(doubts_text(evaluation, evaluation.shown_batches))
    console.print(Text(speed_text(evaluation), style="bold yellow" if is_doubtful else ""))
    for line in [*seen_texts(evaluation), *chosen_texts(evaluation)]:
        console.print(Text(line, style="bold yellow"))
    for grid in summary_tables(evaluation):
        print_grid(grid, console)
    console.print()
    console.print(Text(backbone_text(evaluation)))
    _print_certificate(evaluation, console)


def print_grid(grid: Grid, console: Console) -> None:
    """Print a table between its title and its note."""
    console.print(Text(f"\n{grid.title}", style="bold"))
    print_table(console, _rich_table(grid))
    console.print(Text(grid.note, style="dim"))


def _rich_table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in grid.headers:
        table.add_column(Text(header), justify="right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(_rich_cell(cell) for cell in row))
    return table


def _rich_cell(cell: Cell) -> Text:
    return Text.assemble(cell.value, ("\n" + cell.spread, "dim")) if cell.spread else Text(cell.value)


def _print_certificate(evaluation: Evaluation, console: Console) -> None:
    line = certificate_text(evaluation.certificate)
    if evaluation.certificate.passed:
        console.print(Text.assemble(("certificate passed: ", "green"), line))
        return
    console.print(Text.assemble(("CERTIFICATE FAILED:", "bold white on red"), (f" {line}", "bold red")))
    details = certificate_details(evaluation.certificate)
    for detail in details[:SHOWN_DETAILS]:
        console.print(Text(f"- {detail}", style="red"))
    if len(details) > SHOWN_DETAILS:
        console.print(Text(f"- and {len(details) - SHOWN_DETAILS} more in evaluation.json", style="red"))
