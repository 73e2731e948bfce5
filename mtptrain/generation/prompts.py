"""Prompts from standard input: typed at a terminal, or the lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from mtptrain.errors import UserError

ASK = "prompt> "


def is_typed(stream: TextIO) -> bool:
    """Return whether somebody types into the stream."""
    return stream.isatty()


def read_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines that are not empty, at a terminal after asking for each, until its end (Ctrl-D).

    Raises:
        UserError: a pipe or file holds no line, or bytes that are not UTF-8.
    """
    if is_typed(stream):
        yield from _typed_lines()
        return
    count = 0
    try:
        for line in stream:
            if line.strip():
                count += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt=null: standard input is not UTF-8 ({error.reason}); convert it") from None
    if not count:
        raise UserError('prompt=null: standard input holds no line; give prompt="...", or write a prompt a line')


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 (`input` then has a history and moves the cursor)
    while True:
        try:
            line = input(ASK)
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line
