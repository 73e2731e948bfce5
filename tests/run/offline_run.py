"""Reads the record of an offline W&B run back: a LevelDB log of protocol buffers that W&B itself defines."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # bytes; an entry's header never crosses into the next block
FILE_HEADER, ENTRY_HEADER = 7, 7
FULL, LAST = 1, 4


def records(folder: Path) -> list[Record]:
    """Every record of the ended runs below a folder, oldest run first.

    W&B's own process writes them, a moment after the run has ended.
    """
    found = []
    deadline = time.monotonic() + 20
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        run: list[Record] = []
        while not any(record.HasField("exit") for record in run):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            run = [Record.FromString(entry) for entry in _entries(path.read_bytes())]
        found += run
    return found


def _entries(content: bytes) -> Iterator[bytes]:
    """Source: the log format of LevelDB, doc/log_format.md: checksum, length and type before every fragment."""
    place, parts = FILE_HEADER, b""
    while place + ENTRY_HEADER <= len(content):
        if BLOCK - place % BLOCK < ENTRY_HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + ENTRY_HEADER])
        if place + ENTRY_HEADER + length > len(content):
            return  # still being written
        parts += content[place + ENTRY_HEADER : place + ENTRY_HEADER + length]
        place += ENTRY_HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def history(found: list[Record]) -> list[dict[str, Any]]:
    """Logged rows by name."""
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def artifacts(found: list[Record]) -> dict[str, list[str]]:
    """Names of the stored files by type of artifact."""
    stored = {}
    for record in found:
        if record.WhichOneof("record_type") == "request" or not record.HasField("artifact"):
            continue
        stored[record.artifact.type] = sorted(entry.path for entry in record.artifact.manifest.contents)
    return stored
