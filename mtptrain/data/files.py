"""Local files of rows: JSON lines, JSON and CSV, plain or compressed."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mtptrain.data.notes import note
from mtptrain.errors import UserError
from mtptrain.run.typed_json import JsonObject

Row = JsonObject
Position = JsonObject  # of a reader, as plain values for a checkpoint; {} = the beginning
NumberedRows = Iterator[tuple[int, Row | UserError]]  # the number, from 1, and the row or the reason why it is none

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROW_KINDS = (".jsonl", ".json", ".csv", ".parquet")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")  # also of whole pairs


def kind_of(path: Path) -> str:
    """Return a file's suffix in lower case, without that of its compression: `.jsonl` for a.jsonl.gz."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def stem_of(path: Path) -> str:
    """Return a file's name without its suffix and that of its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).stem


def local_files(setting: str, path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Return the file at `path`, or the files of these kinds in the folder at `path` and below, sorted.

    Hidden files and folders, whose names begin with a dot, are not read, which a note says.

    Args:
        setting: `name=value`, for the error.
        path: a file or a folder.
        kinds: suffixes of readable files.

    Raises:
        UserError: the file is of another kind, or the folder holds no such file.
    """
    listed = ", ".join(kinds)
    if not path.is_dir():
        if not is_readable_kind(path, kinds):
            raise UserError(f"{setting}: a file must end in {listed}, perhaps with .gz or .zst; convert or rename it")
        return [path]
    files = sorted(file for file in path.rglob("*") if is_readable_kind(file, kinds) and file.is_file())
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if len(shown) < len(files):
        note(f"{setting}: {len(files) - len(shown)} hidden files (names with a leading dot) are not read")
    if not shown:
        raise UserError(f"{setting}: the folder holds no {listed} file; give one that does")
    return shown


def is_readable_kind(path: Path, kinds: tuple[str, ...]) -> bool:
    """Return whether a path has one of the suffixes; parquet files are not read from .gz or .zst."""
    is_packed = path.suffix.lower() in COMPRESSIONS
    return kind_of(path) in kinds and not (is_packed and kind_of(path) == ".parquet")


def check_readable(setting: str, path: Path) -> None:
    """Raise a `UserError` unless a file can be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{setting}: cannot be read ({error.strerror}); check the path and its rights") from None


@contextmanager
def open_bytes(setting: str, path: Path) -> Iterator[IO[bytes]]:
    """Yield a file, decompressed.

    Raises:
        UserError: the file cannot be read, or its compression is damaged.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression is None or not path.stat().st_size:
            with path.open("rb") as file:
                yield file
            return
        import pyarrow  # with `datasets`; it decompresses both

        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), compression) as stream:
            yield io.BufferedReader(stream)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{setting}: cannot be read ({reason}); check the file and its rights") from None


def read_text(setting: str, path: Path) -> str:
    """Return the text of a file without its byte order mark.

    Raises:
        UserError: the file is not UTF-8, or cannot be read.
    """
    with open_bytes(setting, path) as file:
        return _decode(f"{setting}:", file.read())


def read_rows(setting: str, path: Path) -> NumberedRows:
    """Yield the rows of a .jsonl, .json or .csv file, plain or compressed.

    Raises:
        UserError: the file cannot be read at all.
    """
    readers: dict[str, Callable[[str, Path], NumberedRows]] = {
        ".jsonl": read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
    }
    return readers[kind_of(path)](setting, path)


def json_lines(setting: str, path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the number, from 1, and the object of every line that is not blank.

    Raises:
        UserError: a line is not a JSON object in UTF-8; the error gives its number.
    """
    for number, row in read_json_lines(setting, path):
        if isinstance(row, UserError):
            raise row
        yield number, row


def read_json_lines(setting: str, path: Path, position: list[int] | None = None) -> NumberedRows:
    """Yield the number, from 1, and the object of every line that is not blank.

    Args:
        setting: `name=value`, for the error.
        path: the file.
        position: [bytes, lines] already read, where reading resumes; updated with every line. None = the beginning.

    Raises:
        UserError: the file cannot be read.
    """
    position = [0, 0] if position is None else position
    with open_bytes(setting, path) as file:
        _skip(file, position[0])
        for line in file:
            position[:] = [position[0] + len(line), position[1] + 1]
            number = position[1]
            try:
                row = _parse(f"{setting}: line {number}", line)
            except UserError as error:
                yield number, error
                continue
            if row is not None:
                yield number, row


def _skip(file: IO[bytes], count: int) -> None:
    """Skip bytes; a compressed file is read up to there."""
    if file.seekable():
        file.seek(count)
        return
    while count > 0 and (read := len(file.read(min(count, 1 << 20)))):
        count -= read


def _parse(where: str, line: bytes) -> Row | None:
    """Return the object of a line; None if it is blank."""
    text = _decode(where, line)
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # broken, a number of thousands of digits, nested too deeply
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)}); mend or drop it") from None
    return _as_row(where, _repair(where, value, line), "write one object a line")


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}); convert it") from None


def _as_row(where: str, value: Any, rule: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object; {rule}")
    return value


def _repair(where: str, value: Any, source: bytes) -> Any:
    """Replace halves of surrogate pairs, which are no characters and which UTF-8 cannot hold, by U+FFFD."""
    if not SURROGATE_ESCAPE.search(source):
        return value
    repaired = _without_surrogates(value)
    if repaired != value:
        note(f"{where} holds half of a surrogate pair; such halves are read as U+FFFD")
    return repaired


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(one) for key, one in value.items()}
    return value


def _read_json(setting: str, path: Path) -> NumberedRows:
    """Yield the objects of a list, a single object, or, in spite of the suffix, those of JSON lines."""
    with open_bytes(setting, path) as file:
        first = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    try:
        has_lines = _parse(setting, first) is not None
    except UserError:  # the first line of a list or of an object over several lines
        has_lines = False
    if has_lines or not first:
        yield from read_json_lines(setting, path)
        return
    with open_bytes(setting, path) as file:
        content = file.read()
    try:
        value = json.loads(_decode(f"{setting}:", content))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{setting}: is not JSON ({error}); write a list of objects, or one object a line") from None
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(_repair(setting, rows, content), start=1):
        try:
            yield number, _as_row(f"{setting}: row {number}", row, "write a list of objects")
        except UserError as error:
            yield number, error


def _read_csv(setting: str, path: Path) -> NumberedRows:
    """Yield the rows below the header, with texts as values."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(setting, path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)  # or a lost quotation mark would swallow all rows after it
        header = _header(setting, reader)
        number = 0
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                yield number, UserError(f"{setting}: row {number} is not CSV ({error}); mend its quotation marks")
                continue
            if fields:
                number += 1
                yield number, _csv_row(f"{setting}: row {number}", header, fields)


def _header(setting: str, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise UserError(f"{setting}: has a header that is not CSV ({error}); mend its quotation marks") from None
    if any(LONE_SURROGATE.search(name) for name in header):
        raise UserError(f"{setting}: is not UTF-8; convert it")
    if len(set(header)) < len(header):
        raise UserError(f"{setting}: names a column twice in its header {header}; rename one")
    return header


def _csv_row(where: str, header: list[str], fields: list[str]) -> Row | UserError:
    if len(fields) != len(header):
        return UserError(f"{where} has {len(fields)} fields and the header {len(header)}; quote texts with commas")
    if any(LONE_SURROGATE.search(one) for one in fields):
        return UserError(f"{where} is not UTF-8; convert the file")
    return dict(zip(header, fields, strict=True))
