"""Rows of local files and of `datasets`, one at a time, for documents and prompts alike."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtptrain.errors import UserError


def local_files(setting: str, path: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the file at `path`, or the files with these suffixes in the folder at `path` and below, sorted.

    Args:
        setting: `name=value`, for the error.
        path: a file or a folder.
        suffixes: suffixes of readable files.

    Raises:
        UserError: the file has another suffix, or the folder holds no such file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if not files:
            raise UserError(f"{setting}: the folder holds no {', '.join(suffixes)} file; give one that does")
        return files
    if path.suffix not in suffixes:
        raise UserError(f"{setting}: a file must end in {', '.join(suffixes)}; convert or rename it")
    return [path]


def check_readable(setting: str, path: Path) -> None:
    """Raise a `UserError` unless a file can be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{setting}: cannot be read ({error.strerror}); check the path and its rights") from None


def json_lines(setting: str, path: Path, position: list[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of every line that is not blank.

    Args:
        setting: `name=value`, for the error.
        path: the file.
        position: [bytes, lines] already read, where reading resumes; updated with every line. None = the beginning.

    Raises:
        UserError: a line is not a JSON object in UTF-8; the error gives its number.
    """
    position = [0, 0] if position is None else position
    with path.open("rb") as file:
        file.seek(position[0])
        for line in file:
            position[:] = [position[0] + len(line), position[1] + 1]
            if not line.strip():
                continue
            number = position[1]
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{setting}: line {number} is not UTF-8 ({error.reason}); convert it") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{setting}: line {number} is not JSON ({error.msg}); mend or drop it") from None
            if not isinstance(row, dict):
                raise UserError(f"{setting}: line {number} is not a JSON object; write one object a line")
            yield number, row


@contextmanager
def _loading(setting: str) -> Iterator[None]:
    """Turn any exception that `datasets` raises inside the block into a `UserError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # not found, no network, a damaged file, a bad schema
        summary = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
        raise UserError(
            f"{setting}: datasets cannot load it ({summary}); check the file, or the name and the network"
        ) from error


def load_rows(setting: str, loader: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of `datasets.load_dataset(loader, **arguments)`.

    Without a `split` among the arguments, read the split `test`, or the first split if there is no `test`.

    Raises:
        UserError: `datasets` cannot load the rows.
    """
    import datasets

    with _loading(setting):
        rows = datasets.load_dataset(loader, **arguments)
        if "split" not in arguments:
            rows = rows["test"] if "test" in rows else next(iter(rows.values()))
        yield from rows


class DatasetRows:
    """Rows of the training split, read lazily, with a state to resume from.

    Args:
        setting: `name=value`, for the error.
        loader: first argument of `datasets.load_dataset`.
        state: `state()` of an earlier reader of the same rows; None = the beginning.
        arguments: further arguments of `datasets.load_dataset`.

    Raises:
        UserError: `datasets` cannot load the rows.
    """

    def __init__(self, setting: str, loader: str, state: dict[str, Any] | None, **arguments: Any) -> None:
        import datasets

        self.setting = setting
        with _loading(setting):
            self.rows = datasets.load_dataset(loader, split="train", streaming=True, **arguments)
            if state is not None:
                self.rows.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _loading(self.setting):  # damaged files and lost connections show only while reading
            yield from self.rows

    def state(self) -> dict[str, Any]:
        """Return the state to resume from, as plain values."""
        state: dict[str, Any] = self.rows.state_dict()
        return state
