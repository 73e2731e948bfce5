"""Read the record of an offline W&B run: a LevelDB log of W&B's protocol buffers."""

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
    """Return every record of the finished runs below a folder, oldest run first; wait up to 20 seconds for them.

    W&B's background process writes them, a moment after the run has ended.
    """
    all_records: list[Record] = []
    deadline = time.monotonic() + 20
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        run: list[Record] = []
        while not any(record.HasField("exit") for record in run):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            run = [Record.FromString(entry) for entry in _entries(path.read_bytes())]
        all_records += run
    return all_records


def _entries(content: bytes) -> Iterator[bytes]:
    """Yield the entries of a log. Each fragment has checksum, length and type (LevelDB, doc/log_format.md)."""
    offset, parts = FILE_HEADER, b""
    while offset + ENTRY_HEADER <= len(content):
        if BLOCK - offset % BLOCK < ENTRY_HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + ENTRY_HEADER])
        if offset + ENTRY_HEADER + length > len(content):
            return  # still being written
        parts += content[offset + ENTRY_HEADER : offset + ENTRY_HEADER + length]
        offset += ENTRY_HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def history(run_records: list[Record]) -> list[dict[str, Any]]:
    """Return the logged rows, values by metric."""
    rows = [record.history for record in run_records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def artifacts(run_records: list[Record]) -> dict[str, list[str]]:
    """Return the names of the stored files by type of artifact."""
    stored = {}
    for record in run_records:
        if record.WhichOneof("record_type") == "request" or not record.HasField("artifact"):
            continue
        stored[record.artifact.type] = sorted(entry.path for entry in record.artifact.manifest.contents)
    return stored
