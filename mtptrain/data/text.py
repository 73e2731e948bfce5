"""`data=text`: the user's own text, from files or from anything that `datasets.load_dataset` takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mtptrain.config import DataConfig
from mtptrain.data.documents import Document, Split, split_of
from mtptrain.errors import UserError

STREAMED_HELDOUT = 256
LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def _local_files(path: Path) -> list[Path]:
    """The readable files that a path means.

    Raises:
        UserError: it cannot be read or holds none.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in LOADERS and file.is_file())
        if not files:
            raise UserError(f"data.path={path}: the folder holds no {', '.join(LOADERS)} file; give one that does")
        return files
    if path.suffix not in LOADERS:
        raise UserError(f"data.path={path}: a file must end in {', '.join(LOADERS)}; convert or rename it")
    return [path]


def _check_json_lines(path: Path) -> bool:
    """Whether a .jsonl file holds anything.

    Raises:
        UserError: a line is not a JSON object; the first such line is named.
    """
    is_empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"data.path={path}: line {number} is not UTF-8 ({error.reason}); convert it") from None
            except json.JSONDecodeError as error:
                raise UserError(f"data.path={path}: line {number} is not JSON ({error.msg}); mend or drop it") from None
            if not isinstance(row, dict):
                raise UserError(f"data.path={path}: line {number} is not a JSON object; write one object a line")
            is_empty = False
    return not is_empty


def _load_rows(loader: str, path: Path | str, config: DataConfig, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Rows of `datasets.load_dataset`, one at a time; `path` is what the user called them."""
    import datasets

    datasets.disable_progress_bars()
    try:
        # Inside the try: a stream meets a damaged file or a lost network only when it is read.
        yield from datasets.load_dataset(loader, split="train", streaming=config.streaming, **arguments)
    except Exception as error:  # datasets raises many types: not found, no network, bad schema
        summary = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or type(error).__name__
        raise UserError(
            f"data.path={path}: datasets cannot load it ({summary}); check the file, or the name and the network"
        ) from error


def _file_rows(path: Path, name: str, config: DataConfig) -> Iterator[tuple[str, str]]:
    """Name and text of every row of one file, which is called `name` in the names."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror}); check the path and its rights") from None
    if path.suffix == ".txt":
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.path={path}: is not UTF-8 text ({error.reason}); convert it") from None
        return
    if path.suffix == ".jsonl" and not _check_json_lines(path):
        return  # datasets cannot load a file without rows
    rows = _load_rows(LOADERS[path.suffix], path, config, data_files=str(path))
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
        files = ((file, file.relative_to(root).as_posix()) for file in _local_files(path))
        named = (item for file, name in files for item in _file_rows(file, name, config))
    else:
        rows = _load_rows(config.path, config.path, config)
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
