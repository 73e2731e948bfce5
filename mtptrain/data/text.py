"""`data=text`: the user's own text, from files or from anything that `datasets.load_dataset` takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mtptrain.config import DataConfig
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.messages import check_messages
from mtptrain.data.rows import check_readable, json_lines, load_rows, local_files
from mtptrain.errors import UserError

STREAMED_HELDOUT = 256
SUFFIXES = (".txt", ".jsonl", ".parquet")


def _file_documents(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    """Documents of one file, which is called `name` in their names."""
    setting = f"data.path={path}"
    check_readable(setting, path)
    if path.suffix == ".txt":
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{setting}: is not UTF-8 text ({error.reason}); convert it") from None
        return
    rows: Iterator[dict[str, Any]]
    if path.suffix == ".jsonl":
        rows = (row for _, row in json_lines(setting, path))
    else:
        rows = load_rows(setting, "parquet", split="train", streaming=config.streaming, data_files=str(path))
    for number, row in enumerate(rows):
        yield _row_document(row, f"{name}:{number}", f"{path}, row {number + 1}", config)


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


def iterate_text(config: DataConfig) -> Iterator[Document]:
    """Every non-empty document of `data.path`, in order, read as it is needed.

    Raises:
        UserError: it cannot be read, a line is broken, or the text column is missing.
    """
    assert config.path is not None
    path = Path(config.path)
    if path.exists() or path.suffix in SUFFIXES:
        # Named by the path below the folder: by bare names a/text.txt and b/text.txt would be held out together.
        root = path if path.is_dir() else path.parent
        files = ((file, file.relative_to(root).as_posix()) for file in local_files(f"data.path={path}", path, SUFFIXES))
        documents = (document for file, name in files for document in _file_documents(file, name, config))
    else:
        rows = load_rows(f"data.path={config.path}", config.path, split="train", streaming=config.streaming)
        documents = (_row_document(row, f"row:{n}", f"{path}, row {n + 1}", config) for n, row in enumerate(rows))
    return (document for document in documents if document.text.strip())


def text_documents(config: DataConfig, split: Split) -> list[Document]:
    """Documents of one side of the hold-out; of a stream, which may have no end, `STREAMED_HELDOUT` held-out ones.

    Raises:
        UserError: there are none.
    """
    found = (document for document in iterate_text(config) if split_of(document.name, config.heldout_every) is split)
    is_endless = config.streaming and split is Split.heldout
    documents = list(islice(found, STREAMED_HELDOUT if is_endless else None))
    if not documents:
        raise UserError(
            f"data.path={config.path}: no document on the {split.value} side; one in data.heldout_every="
            f"{config.heldout_every} is held out by hash of its name, so give more documents or change that number"
        )
    return documents
