"""`data=text`: the user's own text, from files or from anything that `datasets.load_dataset` takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mtptrain.config import DataConfig
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.data.rows import check_readable, json_lines, load_rows, local_files
from mtptrain.errors import UserError

STREAMED_HELDOUT = 256
LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def _file_rows(path: Path, name: str, config: DataConfig) -> Iterator[tuple[str, str]]:
    """Name and text of every row of one file, which is called `name` in the names."""
    setting = f"data.path={path}"
    check_readable(setting, path)
    if path.suffix == ".txt":
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{setting}: is not UTF-8 text ({error.reason}); convert it") from None
        return
    if path.suffix == ".jsonl" and not sum(1 for _ in json_lines(setting, path)):  # all are read: checked before use
        return  # datasets cannot load a file without rows
    loader = LOADERS[path.suffix]
    rows = load_rows(setting, loader, split="train", streaming=config.streaming, data_files=str(path))
    for number, row in enumerate(rows):
        yield f"{name}:{number}", _text_of(row, f"{path}, row {number + 1}", config)


def _text_of(row: dict[str, Any], where: str, config: DataConfig) -> str:
    text = row.get(config.field_name)
    if not isinstance(text, str):
        raise UserError(
            f"data.field_name={config.field_name}: {where} has no text of that name; it has {sorted(row)}; "
            "set data.field_name to the column that holds the text"
        )
    return text


def iterate_text(config: DataConfig) -> Iterator[Document]:
    """Every non-empty document of `data.path`, in order, read as it is needed.

    Raises:
        UserError: it cannot be read, a line is broken, or the text column is missing.
    """
    assert config.path is not None
    path = Path(config.path)
    if path.exists() or path.suffix in LOADERS:
        # Named by the path below the folder: by bare names a/text.txt and b/text.txt would be held out together.
        root = path if path.is_dir() else path.parent
        files = ((file, file.relative_to(root).as_posix()) for file in local_files(f"data.path={path}", path, LOADERS))
        named = (item for file, name in files for item in _file_rows(file, name, config))
    else:
        rows = load_rows(f"data.path={config.path}", config.path, split="train", streaming=config.streaming)
        named = ((f"row:{number}", _text_of(row, f"row {number + 1}", config)) for number, row in enumerate(rows))
    for name, text in named:
        if text.strip():
            yield Document(name, text)


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
