"""`data=text`: documents from local files or a data set of `datasets`; training and held-out documents of a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mtptrain.config import DataConfig, DataFormat, DataSource, require
from mtptrain.data.bad_rows import BadRows
from mtptrain.data.chat import is_answer
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.files import (
    ROW_KINDS,
    Position,
    Row,
    check_readable,
    kind_of,
    local_files,
    read_json_lines,
    read_rows,
    read_text,
)
from mtptrain.data.forms import read_content
from mtptrain.data.notes import note
from mtptrain.data.rows import DatasetRows, load_rows
from mtptrain.data.stdlib import package_documents, stdlib_documents
from mtptrain.errors import UserError

STREAMED_HELDOUT = 256  # held-out documents of a streamed source, which may be endless
KINDS = (".txt", *ROW_KINDS)
PROMPTS = "a data set of prompts takes it in its name: prompts=NAME:SUBSET:SPLIT"


def _row_document(row: Row, name: str, where: str, config: DataConfig) -> Document:
    """Return the document of a row: a text, or a conversation in one of the usual forms.

    Raises:
        UserError: the row has no known form, or is a conversation without an answer to learn from.
    """
    where = f"data.path={where}"
    content = read_content(where, row, config.field_name, config.format)
    if content.form is DataFormat.text:
        return Document(name, content.text)
    form = content.form.value
    note(f"data.path={config.path}: rows are read as conversations of the form {form}; data.format sets another")
    if not any(is_answer(one) for one in content.messages):
        roles = sorted({one["role"] for one in content.messages})
        raise UserError(f"{where}: has no message of role assistant to learn from; drop the row (roles: {roles})")
    text = "\n".join(one["content"] for one in content.messages if one["content"])
    return Document(name, text, content.messages, content.tools)


class TextReader:
    """The documents of `data.path` that are not blank, in order, read lazily, with a position to resume from.

    Args:
        config: settings of the source.
        position: `position()` of an earlier reader of the same files; None = the beginning.

    Raises:
        UserError: the position belongs to other files.
    """

    def __init__(self, config: DataConfig, position: Position | None = None) -> None:
        self.config, self.path = config, Path(str(config.path))
        self.files = _files(config)
        self.origin = _origin(config, self.files)
        position = position or {"origin": self.origin, "file": 0, "row": 0, "state": None}
        if position["origin"] != self.origin:
            raise UserError(
                f"data.path={config.path}: is not what the interrupted run read (other files, or of other sizes); "
                "restore it, or start in another output_dir"
            )
        self._file, self._row, self._begin = position["file"], position["row"], position["state"]
        self._state: Callable[[], Any] = lambda: self._begin
        self.bad_rows, self._num_blank = BadRows(config.on_bad_row), 0

    def position(self) -> Position:
        """Return the position after the last document that was yielded, as plain values."""
        return {"origin": self.origin, "file": self._file, "row": self._row, "state": self._state()}

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: a file cannot be read, a line is broken, or the text column is missing.
        """
        for document in self._documents():
            if document.messages or document.text.strip():
                yield document
            else:
                self._num_blank += 1

    def report(self) -> None:
        """Note the rows that were left out so far."""
        if self.bad_rows.count:
            note(f"data.path={self.config.path}: {self.bad_rows.summary()}")
        if self._num_blank:
            note(f"data.path={self.config.path}: {self._num_blank} blank texts left out")

    def _documents(self) -> Iterator[Document]:
        if self.files is None:
            yield from self._rows(self._dataset_rows(), "row", self.path)
            return
        for path, name in self.files[self._file :]:
            check_readable(f"data.path={path}", path)
            if kind_of(path) == ".txt":
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
            text = read_text(f"data.path={path}", path)
        except UserError as error:
            self.bad_rows.add(error)
            return
        yield Document(name, text)

    def _rows(self, rows: Iterable[Row | UserError], name: str, path: Path) -> Iterator[Document]:
        for row in rows:
            self._row += 1
            try:
                if isinstance(row, UserError):
                    raise row
                document = _row_document(row, f"{name}:{self._row - 1}", f"{path}, row {self._row}", self.config)
            except UserError as error:
                self.bad_rows.add(error)
                continue
            yield document

    def _file_rows(self, path: Path) -> Iterable[Row | UserError]:
        setting = f"data.path={path}"
        if kind_of(path) == ".parquet":
            return self._track(DatasetRows(setting, "parquet", self._begin, data_files=str(path), split="train"))
        if kind_of(path) != ".jsonl":
            return (row for _, row in islice(read_rows(setting, path), self._row, None))
        position = list(self._begin or [0, 0])
        self._state = lambda: list(position)
        return (row for _, row in read_json_lines(setting, path, position))

    def _dataset_rows(self) -> Iterable[Row]:
        setting, name = f"data.path={self.config.path}", str(self.config.path)
        chosen = {"name": self.config.subset, "split": self.config.split or "train"}
        if self.config.streaming:
            return self._track(DatasetRows(setting, name, self._begin, **chosen))
        return load_rows(setting, name, **chosen)

    def _track(self, rows: DatasetRows) -> DatasetRows:
        self._state = rows.state
        return rows


def _files(config: DataConfig) -> list[tuple[Path, str]] | None:
    """Return the files at `data.path` with the names of their documents, or None if it names a data set.

    Raises:
        UserError: files are given beside a setting of data sets.
    """
    path = Path(str(config.path))
    if not path.exists() and kind_of(path) not in KINDS:
        return None
    for name, value in (("subset", config.subset), ("split", config.split)):
        require(
            value is None, f"data.{name}", value, f"is of data sets, and data.path={path} is read as files; {PROMPTS}"
        )
    # Relative paths tell a/text.txt and b/text.txt apart; by bare names both would be held out together.
    root = path if path.is_dir() else path.parent
    return [(file, file.relative_to(root).as_posix()) for file in local_files(f"data.path={path}", path, KINDS)]


def _origin(config: DataConfig, files: list[tuple[Path, str]] | None) -> str:
    """Return a hash that identifies the source: names and sizes of its files, or the data set's names."""
    named = [config.path, config.subset, config.split]
    sizes = [(name, path.stat().st_size) for path, name in files if path.exists()] if files else named
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def text_documents(config: DataConfig, split: Split) -> list[Document]:
    """Return the documents of one side of the hold-out, at most `data.max_documents`.

    A streamed source may be endless: of its held-out documents, return at most `STREAMED_HELDOUT`.

    Raises:
        UserError: there are none.
    """
    reader = TextReader(config)
    of_split = (document for document in reader if split_of(document.name, config.heldout_every) is split)
    limits = [config.max_documents, STREAMED_HELDOUT if config.streaming and split is Split.heldout else None]
    documents = list(islice(of_split, min((one for one in limits if one is not None), default=None)))
    reader.report()
    if not documents:
        bad = f"; {reader.bad_rows.summary()}" if reader.bad_rows.count else ""
        raise UserError(
            f"data.path={config.path}: no document on the {split.value} side; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number{bad}"
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
    if config.packages:
        library += package_documents(config.packages, library, heldout_documents(config))
    return library[: config.max_documents]


def heldout_documents(config: DataConfig) -> list[Document]:
    """Return the documents that are never trained on; for a mixture, of all its sources in order."""
    if config.mixture:
        return [document for part in config.sources().values() for document in heldout_documents(part)]
    if _is_text(config):
        return text_documents(config, Split.heldout)
    return stdlib_documents(Split.heldout, config.heldout_every)[: config.max_documents]
