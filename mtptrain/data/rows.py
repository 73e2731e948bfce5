"""Rows of `datasets` and of parquet files, one at a time, for documents and prompts alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtptrain.data.files import Position, Row
from mtptrain.errors import UserError
from mtptrain.run.hub import HUB_ID
from mtptrain.run.progress import waiting


@contextmanager
def _loading(setting: str, loader: str) -> Iterator[None]:
    """Turn any exception that `datasets` raises inside the block into a `UserError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with _quiet_hub():
            yield
    except Exception as error:  # not found, no network, a damaged file, a bad schema
        summary = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
        raise UserError(f"{setting}: datasets cannot load it ({summary}); {_way_out(loader)}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's client, which prints two lines for every attempt to reach the network."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _way_out(loader: str) -> str:
    if not HUB_ID.fullmatch(loader) or Path(loader).exists():
        return "check the file, or the name and the network"
    return (
        f"check the path (there is no {loader} in the working folder), or the name and the network, or run `hf "
        f"download {loader} --repo-type dataset --local-dir {loader}` where there is a network and copy that folder to "
        "the working directory, or set HF_HOME to a cache that holds the data set, or give a local file"
    )


def _plain(row: Row) -> Row:
    """Return a row without null inside its values: a schema gives every message and every tool the keys of all."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def load_rows(setting: str, loader: str, **arguments: Any) -> Iterator[Row]:
    """Yield the rows of `datasets.load_dataset(loader, **arguments)`.

    Without a `split` among the arguments, read the split `test`, or the first split if there is no `test`.

    Raises:
        UserError: `datasets` cannot load the rows.
    """
    import datasets

    with _loading(setting, loader):
        with waiting(f"loading {loader}"):
            rows = datasets.load_dataset(loader, **arguments)
        if "split" not in arguments:
            rows = rows["test"] if "test" in rows else next(iter(rows.values()))
        yield from map(_plain, rows)


class DatasetRows:
    """Rows of one split, read lazily, with a state to resume from.

    Args:
        setting: `name=value`, for the error.
        loader: first argument of `datasets.load_dataset`.
        state: `state()` of an earlier reader of the same rows; None = the beginning.
        arguments: further arguments of `datasets.load_dataset`.

    Raises:
        UserError: `datasets` cannot load the rows.
    """

    def __init__(self, setting: str, loader: str, state: Position | None, **arguments: Any) -> None:
        import datasets

        self.setting, self.loader = setting, loader
        with _loading(setting, loader):
            self.rows = datasets.load_dataset(loader, streaming=True, **arguments)
            if state is not None:
                self.rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Row]:
        with _loading(self.setting, self.loader):  # damaged files and lost connections show only while reading
            yield from map(_plain, self.rows)

    def state(self) -> Position:
        """Return the state to resume from, as plain values."""
        state: Position = self.rows.state_dict()
        return state
