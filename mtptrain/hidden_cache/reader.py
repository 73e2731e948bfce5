"""`data=streams`: training batches from a stream cache, read one batch ahead of the training.

A cache may have more files than a process can map, and more bytes than anyone wants to hash before the first step: few
files are open at a time, and each is verified when its first streams are read.
"""

# B rows, S tokens per row, N residual streams, D model width

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtptrain.batch import Batch
from mtptrain.data.batches import BatchSource, RowOrder
from mtptrain.data.packing import Piece, fill_rows, pack_pieces
from mtptrain.errors import UserError
from mtptrain.hidden_cache.format import decode_streams, shard_file
from mtptrain.hidden_cache.manifest import StreamCache
from mtptrain.run.distributed import on_rank0

STORED = {"streams", "scales"}  # of `encode_streams`
OPEN_SHARDS = 64  # Linux maps at most 65,530 regions in a process, and a file takes one


class OpenShards:
    """The shards of a cache, opened when they are read and closed when `OPEN_SHARDS` others were read since.

    Args:
        cache: lists the shards that are read.
    """

    def __init__(self, cache: StreamCache) -> None:
        self.cache = cache
        self.verified: set[int] = set()
        self.opened: OrderedDict[int, Any] = OrderedDict()

    def read(self, number: int, begin: int, end: int) -> dict[str, Tensor]:
        """Return what `encode_streams` stored of the tokens `begin` to `end` of a shard.

        Raises:
            UserError: the shard cannot be read, or was altered; its checksum is compared once.
        """
        if number not in self.verified:
            self.cache.verify([shard_file(number)])
            self.verified.add(number)
        if number not in self.opened:
            self.opened[number] = open_shard(self.cache.folder / shard_file(number))
            if len(self.opened) > OPEN_SHARDS:
                self.opened.popitem(last=False)
        self.opened.move_to_end(number)
        file = self.opened[number]
        return {name: file.get_slice(name)[begin:end] for name in STORED.intersection(file.keys())}

    def close_before(self, number: int) -> None:
        """Close the shards before `number`."""
        for other in [other for other in self.opened if other < number]:
            del self.opened[other]


class HiddenStateBatches(BatchSource):
    """The batches of online training on the cache's documents, in the same order, with their streams.

    Args:
        cache: a complete cache.
        sequence_length: tokens per row, at least the cache's longest piece.
        batch_size: rows per batch, over all processes.
        seed: seed of the order.
        dtype: dtype of the backbone's arithmetic.

    Raises:
        UserError: rows are too short for the pieces, or a shard cannot be read.
    """

    def __init__(
        self, cache: StreamCache, sequence_length: int, batch_size: int, seed: int, dtype: torch.dtype
    ) -> None:
        check_row_length(cache, sequence_length)
        self.sequence_length, self.dtype = sequence_length, dtype
        self.shards = OpenShards(cache)
        texts = [read_text(cache.folder / name) for name in cache.files]
        self.starts = np.cumsum([0, *(shard.counts["tokens"] for shard in cache.files.values())]).tolist()
        self.tokens, self.loss_mask, piece_sizes = (np.concatenate(parts) for parts in zip(*texts, strict=True))
        sizes = piece_sizes.tolist()
        self.pieces: list[Piece] = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))
        self.order = RowOrder(on_rank0(lambda: pack_pieces(self.pieces, sequence_length)), batch_size, seed)
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="streams")
        self.ahead: tuple[int, Future[Batch]] | None = None

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchSource`; a piece counts as a document."""
        return self.tokens, np.array([start for start, _ in self.pieces])

    def batch(self, index: int) -> Batch:
        """Return this process's rows of batch `index`, with their streams, and begin to read the next batch.

        Raises:
            UserError: a shard cannot be read, or was altered.
        """
        expected, coming = self.ahead or (index, self.reader.submit(self._read, index))
        if expected != index:
            coming = self.reader.submit(self._read, index)
        batch = coming.result()
        self.ahead = (index + 1, self.reader.submit(self._read, index + 1))
        return batch

    def _read(self, index: int) -> Batch:
        """Return batch `index`; all reading and the order of rows belong to one thread."""
        rows = self.order.rank_rows(index)
        batch = fill_rows(self.tokens, rows, self.sequence_length, self.loss_mask)
        return with_streams(batch, rows, self._streams)

    def _streams(self, piece: Piece) -> Tensor:
        """Return the streams of a piece, [S, N, D]; a piece lies in one shard."""
        start, size = piece
        shard = bisect.bisect_right(self.starts, start) - 1
        begin = start - self.starts[shard]
        return decode_streams(self.shards.read(shard, begin, begin + size), self.dtype)


def check_row_length(cache: StreamCache, sequence_length: int) -> None:
    """Raise a `UserError` if rows are too short for the cache's pieces."""
    longest = cache.identity.sequence_length
    if sequence_length < longest:
        raise UserError(
            f"data.sequence_length={sequence_length}: the cache {cache.folder} holds pieces of up to {longest} "
            f"tokens, whose streams cannot be cut; set at least {longest}"
        )


def with_streams(batch: Batch, rows: list[list[Piece]], streams_of: Callable[[Piece], Tensor]) -> Batch:
    """Return a batch with the streams of its pieces; `streams_of` returns those of one, [S, N, D]."""
    streams_BSND: Tensor | None = None
    for row, pieces in enumerate(rows):
        begin = 0
        for piece in pieces:
            streams_SND = streams_of(piece)
            if streams_BSND is None:
                streams_BSND = streams_SND.new_zeros(*batch.tokens_BS.shape, *streams_SND.shape[1:])
            streams_BSND[row, begin : begin + piece[1]] = streams_SND
            begin += piece[1]
    return replace(batch, streams_BSND=streams_BSND)


def read_text(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a shard's tokens, loss mask and sizes of pieces; its streams stay on disk."""
    file = open_shard(path)
    tokens, loss_mask, sizes = (file.get_tensor(name).numpy() for name in ("tokens", "loss_mask", "piece_sizes"))
    return tokens, loss_mask, sizes


def open_shard(path: Path) -> Any:
    """Open a shard's tensors, mapped into memory."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"data.path={path.parent}: {path.name} cannot be read ({error}); restore the file") from None
