"""Screens for text that is being decoded: colours on a terminal, marks, or the text alone."""

from __future__ import annotations

import time
import unicodedata
from typing import IO, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mtptrain.config import Show
from mtptrain.config.verbosity import print_status
from mtptrain.evaluation.head_result import Piece, PieceKind

# Apart without colours, too: NO_COLOR leaves bold and struck-through text.
STYLES = {PieceKind.accepted: "green", PieceKind.rejected: "red strike", PieceKind.bonus: "bold yellow"}
MARKS = {PieceKind.accepted: ("{", "}"), PieceKind.rejected: ("[-", "-]"), PieceKind.bonus: ("", "")}
NAMES = {
    PieceKind.accepted: "accepted draft",
    PieceKind.rejected: "rejected draft",
    PieceKind.bonus: "verifier's own token",
}
DIM = "dim"


class Screen(Protocol):
    """Shows texts one after the other."""

    def legend(self) -> None:
        """Explain the kinds of pieces."""
        ...

    def begin(self, title: str, prompt: str) -> None:
        """Begin a text: its title, if there are several, and the prompt that it continues."""
        ...

    def show(self, pieces: list[Piece], status: str) -> None:
        """Show what a pass gave; a rejected draft is shown, then replaced by what follows it."""
        ...

    def end(self) -> None:
        """End a text; also one that was interrupted, and also twice."""
        ...

    def print_line(self, line: str) -> None:
        """Print a line about the texts."""
        ...


def open_screen(show: Show, pace: float, console: Console) -> Screen:
    """Return the screen of a setting: `auto` is colours on a terminal, marks on one without, and else the text.

    Args:
        show: the setting.
        pace: seconds that a pass is shown at least, on a terminal.
        console: on standard output.
    """
    if show is Show.auto:
        show = Show.marks if console.is_dumb_terminal else Show.colours if console.is_terminal else Show.text
    if show is Show.colours:
        return ColourScreen(console, pace)
    return MarkScreen(console.file) if show is Show.marks else TextScreen(console.file)


def visible(text: str) -> str:
    """Return a text with its control characters, except line breaks and tabs, as their pictures: ESC -> ␛."""
    return "".join(_picture(one) if unicodedata.category(one) == "Cc" and one not in "\n\t" else one for one in text)


def _picture(control: str) -> str:
    return chr(0x2400 + ord(control)) if ord(control) < 0x20 else "\ufffd"


def on_one_line(text: str) -> str:
    """Return a rejected draft with its line breaks as signs."""
    return visible(text).replace("\n", "↵")


class ColourScreen:
    """Colours on a terminal: finished rows scroll away, and the last row is drawn again with every pass.

    Args:
        console: on the terminal.
        pace: seconds that a pass is shown at least.
    """

    def __init__(self, console: Console, pace: float) -> None:
        self.console, self.pace = console, pace
        self.live: Live | None = None
        self._open_line()

    def legend(self) -> None:
        """See `Screen`."""
        parts = [part for kind, name in NAMES.items() for part in ((name, STYLES[kind]), "  ")]
        self.console.print(Text.assemble(*parts[:-1]))

    def begin(self, title: str, prompt: str) -> None:
        """See `Screen`."""
        self.width = self.console.width
        self.console.print(Text(f"\n{title}" if title else "", style=DIM))
        self.live = Live(console=self.console, auto_refresh=False)
        self.live.start()
        self._open_line()
        self._append(prompt, DIM)

    def show(self, pieces: list[Piece], status: str) -> None:
        """See `Screen`."""
        begun = time.monotonic()
        for piece in pieces:
            if piece.kind is PieceKind.rejected:
                self._draw(Text(on_one_line(piece.text), STYLES[piece.kind]), status)
                self._wait(begun)
            else:
                self._append(piece.text, STYLES[piece.kind])
        self._draw(Text(), status)
        self._wait(begun)

    def end(self) -> None:
        """See `Screen`."""
        if self.live is not None:
            self.live.update(self._rows()[-1], refresh=True)
            self.live.stop()
        self.live = None

    def print_line(self, line: str) -> None:
        """See `Screen`."""
        self.console.print(Text(line))

    def _open_line(self) -> None:
        self.line, self.num_printed = Text(), 0  # the text since the last line break, and its rows that are printed

    def _append(self, text: str, style: str) -> None:
        first, *others = visible(text).split("\n")
        self.line.append(first, style)
        for one in others:
            self._print_rows(self._rows())
            self._open_line()
            self.line.append(one, style)
        self._print_rows(self._rows()[:-1])

    def _rows(self) -> list[Text]:
        """Return the rows of the last line; more text changes only the last of them."""
        return list(self.line.wrap(self.console, self.width)) or [Text()]

    def _print_rows(self, rows: list[Text]) -> None:
        for row in rows[self.num_printed :]:
            self.console.print(row)
        self.num_printed = max(self.num_printed, len(rows))

    def _draw(self, tail: Text, status: str) -> None:
        assert self.live is not None
        self.live.update(Group(self._rows()[-1] + tail, Text(status, style=DIM)), refresh=True)

    def _wait(self, begun: float) -> None:
        time.sleep(max(0.0, begun + self.pace - time.monotonic()))


class MarkScreen:
    """Marks instead of colours: {accepted} and [-rejected-] drafts, and the verifier's own tokens as they are.

    Args:
        out: gets everything.
    """

    def __init__(self, out: IO[str]) -> None:
        self.out, self.is_open = out, False

    def legend(self) -> None:
        """See `Screen`."""
        self.print_line("  ".join(name.join(MARKS[kind]) for kind, name in NAMES.items()))

    def begin(self, title: str, prompt: str) -> None:
        """See `Screen`."""
        self.print_line(f"\n{title}" if title else "")
        self._write(visible(prompt))
        self.is_open = True

    def show(self, pieces: list[Piece], status: str) -> None:
        """See `Screen`."""
        for piece in pieces:
            is_draft = piece.kind is PieceKind.rejected
            self._write((on_one_line if is_draft else visible)(piece.text).join(MARKS[piece.kind]))

    def end(self) -> None:
        """See `Screen`."""
        if self.is_open:
            self._write("\n")
        self.is_open = False

    def print_line(self, line: str) -> None:
        """See `Screen`."""
        self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


class TextScreen:
    """The text alone, without the prompt, for files and pipes; the lines about it go to standard error.

    Args:
        out: gets the text, unchanged.
    """

    def __init__(self, out: IO[str]) -> None:
        self.out, self.is_open = out, False

    def legend(self) -> None:
        """See `Screen`."""

    def begin(self, title: str, prompt: str) -> None:
        """See `Screen`."""
        if title:
            self.print_line(title)
        self.is_open = True

    def show(self, pieces: list[Piece], status: str) -> None:
        """See `Screen`."""
        self.out.write("".join(piece.text for piece in pieces if piece.kind is not PieceKind.rejected))
        self.out.flush()

    def end(self) -> None:
        """See `Screen`."""
        if self.is_open:
            self.out.write("\n")
            self.out.flush()
        self.is_open = False

    def print_line(self, line: str) -> None:
        """See `Screen`."""
        print_status(line)
