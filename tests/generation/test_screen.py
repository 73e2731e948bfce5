"""The screen holds the text once, whatever the width; rejected drafts appear and go."""

import io
import re

import pytest
from rich.console import Console

from mtptrain.config import Show
from mtptrain.evaluation.head_result import Piece, PieceKind
from mtptrain.generation.screen import ColourScreen, MarkScreen, TextScreen, open_screen

STATUS = "9 tokens  2.00 tokens a pass"
PASSES = [
    [Piece("def mean", PieceKind.bonus)],
    [Piece("(values", PieceKind.accepted), Piece("):\n", PieceKind.rejected), Piece(") -> float", PieceKind.bonus)],
    [Piece(":\n    return sum(values)", PieceKind.accepted), Piece(" / len(values)  # of 日本語", PieceKind.bonus)],
    [Piece("\n", PieceKind.bonus)],
]
TEXT = "def mean(values) -> float:\n    return sum(values) / len(values)  # of 日本語\n"


def screen_of(output: str) -> list[str]:
    """Return the rows that a terminal shows after some output; only movements of Rich's live display are known."""
    rows, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", output):
        if code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("2K"):
            rows[row] = ""
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif text:
            rows[row] = rows[row][:column] + text + rows[row][column + 1 :]
            column += 1
        assert code == "" or code[-1] in "AKmhl", code
    return [one.rstrip() for one in rows]


def terminal(width: int, **options: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=20, **options)  # type: ignore[arg-type]


def write(screen: ColourScreen | MarkScreen | TextScreen, prompt: str = "") -> None:
    screen.begin("with the head:", prompt)
    for pieces in PASSES:
        screen.show(pieces, STATUS)
    screen.end()


@pytest.mark.parametrize("width", [9, 23, 40, 120])
def test_a_terminal_ends_with_the_text_and_nothing_else(width: int) -> None:
    console = terminal(width)
    write(ColourScreen(console, 0), "# a prompt\n")
    rows = screen_of(console.file.getvalue())  # type: ignore[attr-defined]
    whole = "".join(("# a prompt\n" + TEXT).split())
    assert "".join("".join(rows).split()) == "withthehead:" + whole
    if width == 120:
        assert [one for one in rows if one] == ["with the head:", "# a prompt", *TEXT.splitlines()]


def test_a_rejected_draft_is_shown_and_then_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(60)
    screen, frames = ColourScreen(console, 0), []
    monkeypatch.setattr(screen, "_wait", lambda begun: frames.append(screen_of(console.file.getvalue())))  # type: ignore[attr-defined]
    write(screen)
    assert frames[1][2:] == ["def mean(values):↵", STATUS]
    assert frames[2][2:] == ["def mean(values) -> float", STATUS]


def test_without_colours_the_kinds_differ_in_weight_and_strike() -> None:
    coloured, plain = terminal(60, color_system="standard"), terminal(60, color_system="standard", no_color=True)
    for console in (coloured, plain):
        screen = ColourScreen(console, 0)
        screen.legend()
        write(screen)
    codes = {
        name: set(re.findall(r"\x1b\[([0-9;]+)m", one.file.getvalue()))
        for name, one in (("coloured", coloured), ("plain", plain))
    }  # type: ignore[attr-defined]
    assert {"32", "9;31", "1;33"} <= codes["coloured"]
    assert codes["plain"] == {"0", "1", "2", "9"}


def test_marks_keep_rejected_drafts() -> None:
    out = io.StringIO()
    screen = MarkScreen(out)
    screen.legend()
    write(screen, "# a prompt\n")
    legend, _, title, *rows = out.getvalue().splitlines()
    assert legend == "{accepted draft}  [-rejected draft-]  verifier's own token"
    assert title == "with the head:"
    assert rows[:2] == ["# a prompt", "def mean{(values}[-):↵-]) -> float{:"]


def test_a_pipe_gets_the_text_alone(capfd: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    write(TextScreen(out), "# a prompt\n")
    assert out.getvalue() == TEXT + "\n"
    assert capfd.readouterr() == ("", "with the head:\n")


def test_control_characters_do_not_reach_a_terminal() -> None:
    console = terminal(60)
    screen = ColourScreen(console, 0)
    screen.begin("", "")
    screen.show([Piece("a\x1b[2Jb\rc\x07", PieceKind.bonus)], STATUS)
    screen.end()
    assert "a␛[2Jb␍c␇" in screen_of(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"force_terminal": True}, ColourScreen),
        ({"force_terminal": True, "_environ": {"TERM": "dumb"}}, MarkScreen),
        ({"force_terminal": False}, TextScreen),
    ],
)
def test_the_form_follows_the_output(options: dict[str, object], kind: type) -> None:
    assert isinstance(open_screen(Show.auto, 0, Console(file=io.StringIO(), **options)), kind)  # type: ignore[arg-type]
    assert isinstance(open_screen(Show.text, 0, Console(file=io.StringIO(), **options)), TextScreen)  # type: ignore[arg-type]
