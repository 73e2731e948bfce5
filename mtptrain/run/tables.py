"""Tables on a terminal of any width: as a table where its words fit, else row by row."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text


def open_console() -> Console:
    """Return the console of results: standard output, as text in a notebook too, where a caller may redirect it."""
    return Console(force_jupyter=False)


def print_sentence(console: Console, line: str, style: str | None = None) -> None:
    """Print a line: in a terminal broken between words, in a file or a pipe whole."""
    console.print(Text(line, style=style or ""), soft_wrap=not console.is_terminal)


def print_table(console: Console, table: Table) -> None:
    """Print a table, or a block for each row if a word or figure of it would be cut."""
    if table.title:  # else broken at the width of the table
        console.print(Text(str(table.title), style="bold"))
        table.title = None
    if _is_whole(table, console.width):
        console.print(table, highlight=False)
        return
    for line in row_lines(table):
        console.print(line)


def _is_whole(table: Table, width: int) -> bool:
    """Return whether every word of a table is whole at a width."""
    trial = Console(file=io.StringIO(), width=width, force_terminal=False, force_jupyter=False)
    with trial.capture() as printed:
        trial.print(table)
    cells = [cell for column in table.columns for cell in (column.header, *column.cells)]
    return {word for cell in cells for word in _words(cell).split()} <= set(printed.get().split())


def row_lines(table: Table) -> Iterator[Text]:
    """Yield the rows of a table as lines: the first column with its header, then one line for each other column."""
    headers = [_words(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for number, (header, cell) in enumerate(zip(headers, row, strict=True)):
            style = cell.style if isinstance(cell, Text) else ""
            yield Text.assemble("  " if number else "", f"{header} ", (_words(cell), style))


def _words(cell: object) -> str:
    text = cell.plain if isinstance(cell, Text) else str(cell)
    return " ".join(text.split())
