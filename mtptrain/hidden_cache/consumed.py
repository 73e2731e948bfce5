"""`consumed.json`: the shards of a stream cache that a training run deleted after their last use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mtptrain.errors import UserError
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.manifest import StreamCache
from mtptrain.run.artifact import StoredFile, find_parts, read_part
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import from_json, to_json

CONSUMED = "consumed.json"


@dataclass(frozen=True, slots=True)
class Consumed:
    """The claim of a run on the shards of a cache.

    Attributes:
        by: output_dir of the run, the only one that may use the cache.
        shards: the first so many shards are deleted.
    """

    by: str
    shards: int


def read_consumed(folder: Path) -> Consumed | None:
    """Return the claim on a cache; None if no run has one.

    Raises:
        UserError: its file is damaged.
    """
    try:
        return from_json(Consumed, json.loads((folder / CONSUMED).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / CONSUMED}: is damaged ({error}); collect the streams anew in another folder"
        ) from None


def deleted_shards(folder: Path) -> set[str]:
    """Return the names of the shards that were deleted after use."""
    consumed = read_consumed(folder)
    return set(map(shard_file, range(consumed.shards))) if consumed is not None else set()


def written_shards(folder: Path, count: int) -> dict[str, StoredFile]:
    """Return the records of the first `count` shards that were written, by name; some may be deleted by now."""
    return find_parts(folder, map(shard_file, range(count)), deleted_shards(folder))


def deleted_bytes(folder: Path) -> int:
    """Return the size of the shards that were deleted after use."""
    parts = (read_part(folder, name) for name in deleted_shards(folder))
    return sum(part.bytes for part in parts if part is not None)


def check_unclaimed(folder: Path, run: str | None) -> None:
    """Raise a `UserError` if another run than the one in folder `run` deletes the shards of a cache; None = any run."""
    consumed = read_consumed(folder)
    if consumed is not None and consumed.by != run:
        way_out = "collect anew in another folder"
        if consumed.shards == 0:
            way_out = f"delete {folder / CONSUMED} if that run has ended: all shards are there"
        raise UserError(
            f"data.path={folder}: the run in {consumed.by} deletes its shards after use (data.delete_consumed) and has "
            f"deleted {consumed.shards}; continue that run with resume=auto, or {way_out}"
        )


def claim_shards(folder: Path, run: str, deletes: bool) -> int:
    """Return the number of shards that are deleted, after claiming the cache for a run that deletes them.

    A deletion that was interrupted is completed.

    Raises:
        UserError: another run deletes the shards, or the folder cannot be written.
    """
    check_unclaimed(folder, run)
    consumed = read_consumed(folder)
    count = consumed.shards if consumed is not None else 0
    if deletes:
        delete_shards(folder, run, count)
    return count


def delete_shards(folder: Path, run: str, count: int) -> None:
    """Delete the first `count` shards; their number is on disk before the first of them is gone.

    Raises:
        UserError: a file cannot be written or deleted.
    """
    earlier = read_consumed(folder)
    first = 0
    try:
        if earlier is None or earlier.shards < count:
            write_json(folder / CONSUMED, to_json(Consumed(run, count)))
            first = earlier.shards if earlier is not None else 0
        for number in range(first, count):
            (folder / shard_file(number)).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"data.delete_consumed=true: {folder} cannot be changed ({error}); give write access, or set it to false"
        ) from None


def deleted_error(cache: StreamCache, number: int, run: str) -> UserError:
    """Return the error for a run in folder `run` that needs a shard which is deleted."""
    return UserError(
        f"{cache.where}: {shard_file(number)} was deleted after use (data.delete_consumed), and the run in {run} needs "
        "it; only a run's newest checkpoint continues with the shards that are left: collect anew in another folder"
    )
