"""Rows of local files and of `datasets`, one at a time, whatever they are read for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtptrain.errors import UserError


def local_files(setting: str, path: Path, suffixes: Collection[str]) -> list[Path]:
    """The readable files that a path means: itself, or what a folder holds of these kinds.

    Args:
        setting: what the user set to what, for the error.
        path: a file or a folder.
        suffixes: of the files that can be read.

    Raises:
        UserError: it is of another kind or holds none.
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


def json_lines(setting: str, path: Path, done: list[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of every line that is not blank.

    Args:
        setting: what the user set to what, for the error.
        path: the file.
        done: bytes and lines that were read before, where this reading begins; kept up to date.

    Raises:
        UserError: a line is not a JSON object; it is named.
    """
    done = [0, 0] if done is None else done
    with path.open("rb") as file:
        file.seek(done[0])
        for line in file:
            done[:] = [done[0] + len(line), done[1] + 1]
            if not line.strip():
                continue
            number = done[1]
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
    """What `datasets` raises inside the block, of many types, as a `UserError`."""
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
    """Rows of `datasets.load_dataset(loader, **arguments)`, one at a time.

    Without a `split` among the arguments they are those of `test` where there is one, else of the first split.

    Raises:
        UserError: `datasets` cannot load them.
    """
    import datasets

    with _loading(setting):
        found = datasets.load_dataset(loader, **arguments)
        if "split" not in arguments:
            found = found["test"] if "test" in found else next(iter(found.values()))
        yield from found


class DatasetRows:
    """Rows of the training split, read as they are needed, and where reading has come to.

    Args:
        setting: what the user set to what, for the error.
        loader: of `datasets.load_dataset`.
        state: of an earlier stream of the same rows; None = from the beginning.
        arguments: of `datasets.load_dataset`.
    """

    def __init__(self, setting: str, loader: str, state: dict[str, Any] | None, **arguments: Any) -> None:
        import datasets

        self.setting = setting
        with _loading(setting):
            self.rows = datasets.load_dataset(loader, split="train", streaming=True, **arguments)
            if state is not None:
                self.rows.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _loading(self.setting):  # a stream meets a damaged file or a lost network only when it is read
            yield from self.rows

    def state(self) -> dict[str, Any]:
        """Where to read on, as plain values."""
        found: dict[str, Any] = self.rows.state_dict()
        return found
