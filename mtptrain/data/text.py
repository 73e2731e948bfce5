"""`data=text`: documents from local files or a data set of `datasets`; training and held-out documents of a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.documents import Document, Split, check_messages, split_of
from mtptrain.data.rows import DatasetRows, check_readable, json_lines, load_rows, local_files
from mtptrain.data.stdlib import package_documents, stdlib_documents
from mtptrain.errors import UserError

STREAMED_HELDOUT = 256  # held-out documents of a streamed source, which may be endless
SUFFIXES = (".txt", ".jsonl", ".parquet")


def _row_document(row: dict[str, Any], name: str, where: str, config: DataConfig) -> Document:
    """Return the document of a row: the text of its column, or a conversation if the column holds a list.

    Raises:
        UserError: the column holds neither, or the conversation has no assistant message.
    """
    content = row.get(config.field_name)
    if isinstance(content, str):
        return Document(name, content)
    if not isinstance(content, list):
        raise UserError(
            f"data.field_name={config.field_name}: {where} has no text of that name; it has {sorted(row)}; "
            "set data.field_name to the column that holds the text, or the list of messages"
        )
    messages = check_messages(f"data.path={where}", content)
    if not any(one["role"] == "assistant" for one in messages):
        raise UserError(f"data.path={where}: has no message of role assistant to learn from; drop the row")
    return Document(name, "\n".join(one["content"] for one in messages), messages)


class TextReader:
    """The documents of `data.path` that are not blank, in order, read lazily, with a position to resume from.

    Args:
        config: settings of the source.
        position: `position()` of an earlier reader of the same files; None = the beginning.

    Raises:
        UserError: the position belongs to other files.
    """

    def __init__(self, config: DataConfig, position: dict[str, Any] | None = None) -> None:
        self.config, self.path = config, Path(str(config.path))
        self.files = _files(self.path)
        self.origin = _origin(config, self.files)
        position = position or {"origin": self.origin, "file": 0, "row": 0, "state": None}
        if position["origin"] != self.origin:
            raise UserError(
                f"data.path={config.path}: is not what the interrupted run read (other files, or of other sizes); "
                "restore it, or start in another output_dir"
            )
        self._file, self._row, self._begin = position["file"], position["row"], position["state"]
        self._state: Callable[[], Any] = lambda: self._begin

    def position(self) -> dict[str, Any]:
        """Return the position after the last document that was yielded, as plain values."""
        return {"origin": self.origin, "file": self._file, "row": self._row, "state": self._state()}

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: a file cannot be read, a line is broken, or the text column is missing.
        """
        return (document for document in self._documents() if document.text.strip())

    def _documents(self) -> Iterator[Document]:
        if self.files is None:
            yield from self._rows(self._dataset_rows(), "row", self.path)
            return
        for path, name in self.files[self._file :]:
            check_readable(f"data.path={path}", path)
            if path.suffix == ".txt":
                yield from self._whole(path, name)
            else:
                yield from self._rows(self._file_rows(path), name, path)
            self._file, self._row, self._begin = self._file + 1, 0, None
            self._state = lambda: self._begin

    def _whole(self, path: Path, name: str) -> Iterator[Document]:
        """Yield the document of a .txt file, unless the position lies after it."""
        if self._row:
            return
        self._row = 1
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"data.path={path}: is not UTF-8 text ({error.reason}); convert it") from None

    def _rows(self, rows: Iterable[dict[str, Any]], name: str, path: Path) -> Iterator[Document]:
        for row in rows:
            self._row += 1
            yield _row_document(row, f"{name}:{self._row - 1}", f"{path}, row {self._row}", self.config)

    def _file_rows(self, path: Path) -> Iterable[dict[str, Any]]:
        if path.suffix == ".jsonl":
            position = list(self._begin or [0, 0])
            self._state = lambda: list(position)
            return (row for _, row in json_lines(f"data.path={path}", path, position))
        return self._track(DatasetRows(f"data.path={path}", "parquet", self._begin, data_files=str(path)))

    def _dataset_rows(self) -> Iterable[dict[str, Any]]:
        setting, name = f"data.path={self.config.path}", str(self.config.path)
        if self.config.streaming:
            return self._track(DatasetRows(setting, name, self._begin))
        return load_rows(setting, name, split="train")

    def _track(self, rows: DatasetRows) -> DatasetRows:
        self._state = rows.state
        return rows


def _files(path: Path) -> list[tuple[Path, str]] | None:
    """Return the files at a path with the names of their documents, or None if it names a data set."""
    if not path.exists() and path.suffix not in SUFFIXES:
        return None
    # Relative paths tell a/text.txt and b/text.txt apart; by bare names both would be held out together.
    root = path if path.is_dir() else path.parent
    return [(file, file.relative_to(root).as_posix()) for file in local_files(f"data.path={path}", path, SUFFIXES)]


def _origin(config: DataConfig, files: list[tuple[Path, str]] | None) -> str:
    """Return a hash that identifies the source: names and sizes of its files, or the data set's name."""
    sizes = [(name, path.stat().st_size) for path, name in files if path.exists()] if files else config.path
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def text_documents(config: DataConfig, split: Split) -> list[Document]:
    """Return the documents of one side of the hold-out.

    A streamed source may be endless: of its held-out documents, return the first `STREAMED_HELDOUT`.

    Raises:
        UserError: there are none.
    """
    of_split = (document for document in TextReader(config) if split_of(document.name, config.heldout_every) is split)
    is_limited = config.streaming and split is Split.heldout
    documents = list(islice(of_split, STREAMED_HELDOUT if is_limited else None))
    if not documents:
        raise UserError(
            f"data.path={config.path}: no document on the {split.value} side; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number"
        )
    return documents


def _is_text(config: DataConfig) -> bool:
    """Return whether the documents are the user's own text, not the standard library."""
    return config.source is DataSource.text or (config.source is DataSource.on_policy and config.path is not None)


def training_documents(config: DataConfig) -> list[Document]:
    """Return the documents to train on; for `on_policy`, the documents that prompts are cut from."""
    if _is_text(config):
        return text_documents(config, Split.train)
    library = stdlib_documents(Split.train, config.heldout_every)
    if not config.packages:
        return library
    return library + package_documents(config.packages, library, heldout_documents(config))


def heldout_documents(config: DataConfig) -> list[Document]:
    """Return the documents that are never trained on; for a mixture, of all its sources in order."""
    if config.mixture:
        return [document for part in config.sources().values() for document in heldout_documents(part)]
    if _is_text(config):
        return text_documents(config, Split.heldout)
    return stdlib_documents(Split.heldout, config.heldout_every)
