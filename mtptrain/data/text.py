"""`data=text`: the user's own text, from files or from anything that `datasets.load_dataset` takes."""

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

STREAMED_HELDOUT = 256
SUFFIXES = (".txt", ".jsonl", ".parquet")


def _row_document(row: dict[str, Any], name: str, where: str, config: DataConfig) -> Document:
    """The document of a row: the text of its column, or the conversation where it holds a list.

    Raises:
        UserError: it holds neither, or a conversation in which the assistant says nothing.
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
    """Every non-empty document of `data.path`, in order, read as it is needed, and where reading has come to.

    Args:
        config: where the documents are.
        place: of an earlier reader of the same files, which this one goes on from; None = the beginning.

    Raises:
        UserError: the files are not those that the place is one of.
    """

    def __init__(self, config: DataConfig, place: dict[str, Any] | None = None) -> None:
        self.config, self.path = config, Path(str(config.path))
        self.files = _files(self.path)
        self.origin = _origin(config, self.files)
        place = place or {"origin": self.origin, "file": 0, "row": 0, "state": None}
        if place["origin"] != self.origin:
            raise UserError(
                f"data.path={config.path}: is not what the interrupted run read (other files, or of other sizes); "
                "restore it, or start in another output_dir"
            )
        self._file, self._row, self._begin = place["file"], place["row"], place["state"]
        self._state: Callable[[], Any] = lambda: self._begin

    def place(self) -> dict[str, Any]:
        """Where to read on after the last document that was given out, as plain values."""
        return {"origin": self.origin, "file": self._file, "row": self._row, "state": self._state()}

    def __iter__(self) -> Iterator[Document]:
        """The documents.

        Raises:
            UserError: one cannot be read, a line is broken, or the text column is missing.
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
        """The one document of a .txt file, unless it was read before."""
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
            done = list(self._begin or [0, 0])
            self._state = lambda: list(done)
            return (row for _, row in json_lines(f"data.path={path}", path, done))
        return self._stream(DatasetRows(f"data.path={path}", "parquet", self._begin, data_files=str(path)))

    def _dataset_rows(self) -> Iterable[dict[str, Any]]:
        setting, name = f"data.path={self.config.path}", str(self.config.path)
        if self.config.streaming:
            return self._stream(DatasetRows(setting, name, self._begin))
        return load_rows(setting, name, split="train")

    def _stream(self, rows: DatasetRows) -> DatasetRows:
        self._state = rows.state
        return rows


def _files(path: Path) -> list[tuple[Path, str]] | None:
    """Files of a path and the names that they give their documents; None where it names a data set."""
    if not path.exists() and path.suffix not in SUFFIXES:
        return None
    # Named by the path below the folder: by bare names a/text.txt and b/text.txt would be held out together.
    root = path if path.is_dir() else path.parent
    return [(file, file.relative_to(root).as_posix()) for file in local_files(f"data.path={path}", path, SUFFIXES)]


def _origin(config: DataConfig, files: list[tuple[Path, str]] | None) -> str:
    """What a place in the text is a place of: the names and sizes of its files, or the data set's name."""
    sizes = [(name, path.stat().st_size) for path, name in files if path.exists()] if files else config.path
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def text_documents(config: DataConfig, split: Split) -> list[Document]:
    """Documents of one side of the hold-out; of a stream, which may have no end, `STREAMED_HELDOUT` held-out ones.

    Raises:
        UserError: there are none.
    """
    found = (document for document in TextReader(config) if split_of(document.name, config.heldout_every) is split)
    is_endless = config.streaming and split is Split.heldout
    documents = list(islice(found, STREAMED_HELDOUT if is_endless else None))
    if not documents:
        raise UserError(
            f"data.path={config.path}: no document on the {split.value} side; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number"
        )
    return documents


def _is_text(config: DataConfig) -> bool:
    """Whether the documents are the user's own text and not the standard library's."""
    return config.source is DataSource.text or (config.source is DataSource.on_policy and config.path is not None)


def training_documents(config: DataConfig) -> list[Document]:
    """Documents to train on; of `on_policy`, those that prompts are cut from."""
    if _is_text(config):
        return text_documents(config, Split.train)
    library = stdlib_documents(Split.train, config.heldout_every)
    if not config.packages:
        return library
    return library + package_documents(config.packages, library, heldout_documents(config))


def heldout_documents(config: DataConfig) -> list[Document]:
    """Documents that no training of ours sees.

    Those of a mixture are all its sources', in their order.
    """
    if config.mixture:
        return [document for part in config.sources().values() for document in heldout_documents(part)]
    if _is_text(config):
        return text_documents(config, Split.heldout)
    return stdlib_documents(Split.heldout, config.heldout_every)
