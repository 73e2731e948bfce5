"""Tables of acceptance length and acceptance by position, and the summary that the terminal shows."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtptrain.evaluation.head_result import POSITION_METRICS, Acceptance, Gain
from mtptrain.evaluation.report.headline import (
    Headline,
    backbone_text,
    certificate_details,
    certificate_text,
    headline,
    headline_text,
    seen_texts,
    span,
    speed_text,
)
from mtptrain.evaluation.result import Evaluation, PromptsResult, Spread

MISSING_VALUE = "-"
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
    if measured is None:
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


def share_cell(share: float | None) -> Cell:
    """Return a share with three decimals."""
    return Cell(MISSING_VALUE if share is None else f"{share:.3f}")


def prompts_text(prompts: PromptsResult) -> str:
    """Return the number of prompts and, if they are not independent, of the groups that intervals resample."""
    groups = prompts.conversations
    return f"{prompts.count} prompts" if groups == prompts.count else f"{groups} groups of {prompts.count} prompts"


def length_table(evaluation: Evaluation) -> Grid:
    """Return acceptance length and speed-up of each head, and the gain, by K."""
    names = [head.name for head in evaluation.heads]
    gains, speedups = evaluation.gain or {}, evaluation.speedup[evaluation.first_batch]
    gain_header = ["gain\ntok/pass"] if gains else []
    headers = ["K", *(f"{name}\ntok/pass" for name in names), *gain_header, *(f"{name}\nspeed-up" for name in names)]
    rows = []
    for length in evaluation.draft_lengths:
        row = [Cell(str(length)), *(length_cell(head.replay[length]) for head in evaluation.heads)]
        if gains:
            row.append(gain_cell(gains[length]))
        rows.append(row + [ratio_cell(speedups[name][length]) for name in names])
    note = (
        f"tok/pass: tokens a verify pass, 95 % bootstrap interval over {prompts_text(evaluation.prompts)}. "
        "Speed-up: tokens/s over plain decoding, median and quartiles of the timed batches of "
        f"{evaluation.first_batch}."
    )
    return Grid("Acceptance length and speed-up by draft length K", headers, rows, note)


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


def summary_tables(evaluation: Evaluation) -> list[Grid]:
    """Return the tables of the terminal, which has room for three metrics by position."""
    return [length_table(evaluation), position_table(evaluation, tuple(POSITION_METRICS)[:3])]


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Print the headline, the two tables, the backbone's loss and the certificate.

    Args:
        evaluation: the result.
        console: of 80 columns or more.
    """
    console.print(Text(headline_text(evaluation), style=STYLES[headline(evaluation)]))
    console.print(Text(speed_text(evaluation)))
    for line in seen_texts(evaluation):
        console.print(Text(line, style="bold yellow"))
    for grid in summary_tables(evaluation):
        console.print(Text(f"\n{grid.title}", style="bold"))
        console.print(_rich_table(grid))
        console.print(Text(grid.note, style="dim"))
    console.print()
    console.print(Text(backbone_text(evaluation)))
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
