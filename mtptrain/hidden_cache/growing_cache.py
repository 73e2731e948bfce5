"""`data.follow=true`: a stream cache that `+recipe=collect` may still be writing, looked at shard by shard.

Nothing is written for the follower: each shard has a record, `shard_NNNNN.json`, once it is whole, `begun.json` holds
the cache's identity, and the manifest says that there are no more shards.
"""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path

from mtptrain.config import DataConfig
from mtptrain.errors import UserError
from mtptrain.hidden_cache.consumed import check_unclaimed, claim_shards, delete_shards, deleted_error
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.manifest import STREAM_CACHE, StreamCache, StreamContent, open_cache
from mtptrain.run.artifact import Artifact, is_begun, is_whole, read_begun, read_part
from mtptrain.run.distributed import on_each_rank, on_rank0
from mtptrain.run.progress import waiting

POLL_SECONDS = 1.0
WAY_OUT = "look at the run of +recipe=collect, continue it with resume=auto, and then this run, too"


def open_streams(data: DataConfig, minutes: int) -> StreamCache:
    """Return the cache at `data.path`; with `data.follow`, wait until it is begun; it lists no shard until complete.

    Args:
        data: settings of the cache.
        minutes: longest wait.

    Raises:
        UserError: the cache is missing or damaged; without `data.follow`, unfinished.
    """
    folder = Path(str(data.path))
    if not data.follow:
        return open_cache(folder)
    begun = time.monotonic()
    with waiting(f"waiting for +recipe=collect to begin data.path={folder}"):
        while not (is_begun(folder) or _has_manifest(folder)):
            if time.monotonic() - begun >= 60 * minutes:
                raise UserError(f"distributed_timeout={minutes}: no stream cache was begun in {folder}; {WAY_OUT}")
            time.sleep(POLL_SECONDS)
    if _has_manifest(folder):
        return open_cache(folder)
    identity = read_begun(STREAM_CACHE, "data.path", folder)
    return Artifact(STREAM_CACHE, f"data.path={folder}", folder, identity, {}, StreamContent(0, 0, 0))


def _has_manifest(folder: Path) -> bool:
    return (folder / STREAM_CACHE.manifest).exists()


class Sight(Enum):
    """State of the next shard."""

    there = "there"
    awaited = "awaited"
    none_left = "none_left"  # the cache is complete, and has fewer shards


class GrowingCache:
    """A cache that may still be written, read by one run.

    Args:
        cache: of `open_streams`; its shards are listed when they are first seen.
        run: output_dir of the run.
        deletes: whether the run deletes shards after use.

    Raises:
        UserError: another run deletes the shards.
    """

    def __init__(self, cache: StreamCache, run: str, deletes: bool) -> None:
        self.cache, self.run, self.deletes = cache, run, deletes
        # The number of shards; None = unknown. The manifest may have come since `open_streams` looked for it.
        self.total = len(cache.files) or None
        self.num_deleted = on_rank0(lambda: claim_shards(cache.folder, run, deletes))

    @property
    def is_single_pass(self) -> bool:
        """Whether shards that were read may be gone, so that there is no second epoch."""
        return self.deletes or self.num_deleted > 0

    def look(self, number: int) -> Sight:
        """Return whether every process sees shard `number`; all of them call it.

        Raises:
            UserError: on every process: a process finds it deleted or damaged.
        """
        sights = set(on_each_rank(lambda: self._see(number)))
        return sights.pop() if len(sights) == 1 else Sight.awaited

    def _see(self, number: int) -> Sight:
        cache, name = self.cache, shard_file(number)
        if number < self.num_deleted:
            raise deleted_error(cache, number, self.run)
        if self.total is None and _has_manifest(cache.folder):
            complete = open_cache(cache.folder)
            cache.files.update(complete.files)
            self.total = len(complete.files)
        if self.total is not None and number >= self.total:
            return Sight.none_left
        stored = cache.files.get(name) or read_part(cache.folder, name)
        if stored is None:
            check_unclaimed(cache.folder, self.run)
            return Sight.awaited
        if not is_whole(cache.folder, name, stored):
            check_unclaimed(cache.folder, self.run)
            raise cache.damage(name)
        cache.files[name] = stored
        return Sight.there

    def delete_before(self, number: int) -> None:
        """Delete the shards before `number`, which no process reads again; all processes call it.

        Raises:
            UserError: on every process: a file cannot be written or deleted.
        """
        on_rank0(lambda: delete_shards(self.cache.folder, self.run, number))
        self.num_deleted = max(self.num_deleted, number)
