"""A table shows all of its words and figures on a terminal of any width."""

import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtptrain.run.tables import print_sentence, print_table


def table() -> Table:
    made = Table("K", "tokens a pass", "speed-up", title="Gain")
    for k in range(1, 3):
        made.add_row(str(k), Text(f"{k}.1234567\n1 to 2", "green"), f"{k}.9876543x")
    return made


def printed(width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    print_table(console, table())
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [12, 20, 28, 40, 80])
def test_no_figure_is_cut(width: int) -> None:
    output = printed(width)
    assert "…" not in output
    assert {"1.1234567", "2.1234567", "1.9876543x", "2.9876543x"} <= set(output.split())


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_sentence_is_broken_between_words_in_a_terminal_only(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=12, force_terminal=is_terminal)
    print_sentence(console, "one [bold] sentence of words")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == (["one [bold] ", "sentence of ", "words"] if is_terminal else ["one [bold] sentence of words"])


def test_a_narrow_table_is_printed_row_by_row() -> None:
    rows = ["Gain", "K 1", "  tokens a pass 1.1234567 1 to", "2", "  speed-up 1.9876543x", "K 2"]
    assert printed(30).splitlines()[: len(rows)] == rows
    assert "┏" in printed(40)


def test_a_title_that_is_longer_than_its_table_stays_on_one_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    title = "Memory of a GPU during the rollout and its backward"
    print_table(console, Table("", "GB", title=title))
    assert console.file.getvalue().startswith(f"{title}\n")  # type: ignore[attr-defined]


def test_no_colour_is_printed_without_colours() -> None:
    for options, has_colour in (({}, True), ({"no_color": True}, False)):
        output = printed(80, force_terminal=True, color_system="standard", **options)
        assert ("\x1b[32m" in output) is has_colour
