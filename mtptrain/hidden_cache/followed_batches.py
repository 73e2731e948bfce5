"""Training batches from a stream cache in the order of its shards, while `+recipe=collect` may still be writing it."""

# B rows, S tokens per row, N residual streams, D model width

from __future__ import annotations

import bisect
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mtptrain.batch import Batch
from mtptrain.config.rules import as_written
from mtptrain.data.batches import BatchSource
from mtptrain.data.files import Position
from mtptrain.data.packing import Piece, fill_rows, pack_pieces
from mtptrain.errors import UserError
from mtptrain.hidden_cache import growing_cache
from mtptrain.hidden_cache.consumed import deleted_error
from mtptrain.hidden_cache.format import decode_streams, shard_file
from mtptrain.hidden_cache.growing_cache import WAY_OUT, GrowingCache, Sight
from mtptrain.hidden_cache.reader import OPEN_SHARDS, OpenShards, check_row_length, read_text, with_streams
from mtptrain.run.distributed import max_over_processes, on_each_rank, rank_rows
from mtptrain.run.progress import waiting


@dataclass(frozen=True, slots=True)
class RowSettings:
    """The settings that determine the rows and their order.

    Attributes:
        length: tokens per row, at least the cache's longest piece.
        batch_size: rows per batch, over all processes.
        seed: seed of the order.
    """

    length: int
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class ShardText:
    """The text of a shard: int32 token ids, loss mask, and the pieces of each row in training order."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    rows: list[list[Piece]]


class FollowedBatches(BatchSource):
    """Batches of the rows of one shard after another, then of all rows in a new order each epoch.

    Each shard is packed and shuffled by itself, so its rows are known when it is there. If shards are deleted after
    use, there is only one epoch.

    Args:
        source: the cache.
        settings: of the rows.
        dtype: dtype of the backbone's arithmetic.
        minutes: longest wait for a shard.

    Raises:
        UserError: rows are too short for the pieces.
    """

    def __init__(self, source: GrowingCache, settings: RowSettings, dtype: torch.dtype, minutes: int) -> None:
        check_row_length(source.cache, settings.length)
        self.source, self.settings, self.dtype, self.minutes = source, settings, dtype, minutes
        self.shards = OpenShards(source.cache)
        self.texts: OrderedDict[int, ShardText] = OrderedDict()  # those used last
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="streams")
        self.ahead: dict[int, Future[Batch]] = {}
        self.index = 0  # of the next batch
        self.offset = 0  # row number of batch 0, negative if batches of other data preceded
        self.is_complete = False  # all shards are known
        self._begin(0, 0)
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled_epoch)  # a batch may span two

    def _begin(self, shard: int, row: int) -> None:
        """Know no shard yet; the first to be read is `shard`, whose first row is number `row`."""
        self.first_shard, self.firsts = shard, [row]  # first row of each known shard, and of the one after them

    def await_batches(self, end: int, is_stopped: Callable[[], bool]) -> bool:
        """See `BatchSource`; also look for the shards of the batch after them, which is read ahead."""
        if self._has_rows(end + 1):
            return True
        begun = time.monotonic()
        with waiting(f"waiting for shards in data.path={self.source.cache.folder}"):
            while not self._has_rows(end + 1):
                number = self.first_shard + len(self.firsts) - 1
                sight = self.source.look(number)
                if sight is Sight.there:
                    self._add(number)
                    begun = time.monotonic()
                    continue
                self.is_complete = sight is Sight.none_left
                if self._has_rows(end):
                    return True
                if self.is_complete:
                    raise self._exhausted()
                if max_over_processes(int(is_stopped())):
                    return False
                if max_over_processes(int(time.monotonic() - begun >= 60 * self.minutes)):
                    raise UserError(
                        f"distributed_timeout={self.minutes}: {shard_file(number)} did not appear in "
                        f"{self.source.cache.folder} within {self.minutes} minutes; {WAY_OUT}"
                    )
                time.sleep(growing_cache.POLL_SECONDS)
        return True

    def batch(self, index: int) -> Batch:
        """Return this process's rows of batch `index`, which was waited for, and begin to read the next batch.

        Raises:
            UserError: a shard cannot be read, or was altered.
        """
        coming = self.ahead.pop(index, None) or self.reader.submit(self._read, index)
        batch = coming.result()
        self.index = index + 1
        is_known = self._has_rows(index + 2)
        self.ahead = {index + 1: self.reader.submit(self._read, index + 1)} if is_known else {}
        return batch

    def position(self) -> Position:
        """Return the number of the next row and, in the first epoch, its shard and that shard's first row."""
        row, shard, first = self._row(self.index), 0, 0
        if row <= self.firsts[-1]:
            known = bisect.bisect_right(self.firsts, row) - 1
            shard, first = self.first_shard + known, self.firsts[known]
        return {"row": row, "shard": shard, "first": first, "length": self.settings.length}

    def seek(self, index: int, positions: list[Position], passages: object = None) -> None:
        """See `BatchSource`.

        Raises:
            UserError: the interrupted run had rows of another length, or shards that it needs are deleted.
        """
        position = positions[0]
        if position["length"] != self.settings.length:
            raise UserError(
                f"data.sequence_length={self.settings.length}: the interrupted run followed its cache with rows of "
                f"{position['length']} tokens; set it back"
            )
        if position["shard"] < self.source.num_deleted:
            raise deleted_error(self.source.cache, position["shard"], self.source.run)
        self.restart(index)
        self.offset += position["row"]
        if self.source.num_deleted:  # otherwise every shard is counted, for later epochs
            self._begin(position["shard"], position["first"])

    def restart(self, index: int, passages: object = None) -> None:
        """See `BatchSource`."""
        self.index, self.offset = index, -index * self.settings.batch_size

    def saved(self) -> None:
        """Delete the shards before the next row's, if the run deletes them after use."""
        if self.source.deletes:
            shard = self.position()["shard"]
            self.reader.submit(self._release, shard).result()
            self.source.delete_before(shard)

    def _release(self, number: int) -> None:
        """Unmap the shards before `number`, so that deleting them frees their disk space."""
        self.shards.close_before(number)
        for shard in [shard for shard in self.texts if shard < number]:
            del self.texts[shard]  # it is mapped, too

    def close(self) -> None:
        """See `BatchSource`."""
        self.reader.shutdown(cancel_futures=True)

    def _row(self, index: int) -> int:
        """Return the number of the first row of a batch."""
        return self.offset + index * self.settings.batch_size

    def _has_rows(self, end: int) -> bool:
        """Return whether the rows of the batches before `end` are known."""
        return self._row(end) <= self.firsts[-1] or (self.is_complete and not self.source.is_single_pass)

    def _exhausted(self) -> UserError:
        rows, size = self.firsts[-1], self.settings.batch_size
        return UserError(
            f"data.delete_consumed={as_written(self.source.deletes)}: all {rows} rows of {self.source.cache.folder} "
            f"are used, {size} at a time, and deleted shards leave no second epoch; the last step is saved: give its "
            "number as train.steps, with resume=auto and resume_allow=[train.steps]"
        )

    def _add(self, number: int) -> None:
        """Add the rows of the next shard."""
        counts = on_each_rank(lambda: len(self.reader.submit(self._text, number).result().rows))
        self.firsts.append(self.firsts[-1] + counts[0])

    def _read(self, index: int) -> Batch:
        """Return batch `index`; all reading belongs to one thread."""
        first = self._row(index)
        parts = [self._read_row(first + row) for row in rank_rows(self.settings.batch_size)]
        names = ("tokens_BS", "segment_BS", "position_BS", "loss_mask_BS", "streams_BSND")
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def _read_row(self, row: int) -> Batch:
        """Return a row as a batch of one."""
        total = self.firsts[-1]
        if row >= total:
            epoch, number = divmod(row, total)
            row = int(self._epoch_order(epoch)[number])
        known = bisect.bisect_right(self.firsts, row) - 1
        shard = self.first_shard + known
        text = self._text(shard)
        rows = [text.rows[row - self.firsts[known]]]
        batch = fill_rows(text.tokens, rows, self.settings.length, text.loss_mask)
        return with_streams(batch, rows, lambda piece: self._streams(shard, piece))

    def _shuffled_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, epoch]).permutation(self.firsts[-1])

    def _streams(self, shard: int, piece: Piece) -> Tensor:
        return decode_streams(self.shards.read(shard, piece[0], piece[0] + piece[1]), self.dtype)

    def _text(self, shard: int) -> ShardText:
        """Return the text of a shard, packed into rows."""
        if shard not in self.texts:
            tokens, loss_mask, sizes = read_text(self.source.cache.folder / shard_file(shard))
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            packed = pack_pieces(list(zip(starts, sizes.tolist(), strict=True)), self.settings.length)
            order = np.random.default_rng([self.settings.seed, 0, shard]).permutation(len(packed))
            self.texts[shard] = ShardText(tokens, loss_mask, [packed[number] for number in order])
            if len(self.texts) > OPEN_SHARDS:
                self.texts.popitem(last=False)
        self.texts.move_to_end(shard)
        return self.texts[shard]
