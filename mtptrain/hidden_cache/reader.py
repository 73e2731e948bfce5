"""`data=streams`: training batches from a stream cache; the streams of a row are read from disk on request."""

# B rows, S tokens per row, N residual streams, D model width

from __future__ import annotations

import bisect
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
from mtptrain.hidden_cache.format import decode_streams
from mtptrain.hidden_cache.manifest import StreamCache
from mtptrain.run.distributed import on_rank0


class HiddenStateBatches(BatchSource):
    """The batches of online training on the cache's documents, in the same order, with their streams.

    Args:
        cache: a complete cache with verified shards.
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
        longest = cache.identity.sequence_length
        if sequence_length < longest:
            raise UserError(
                f"data.sequence_length={sequence_length}: the cache {cache.folder} holds pieces of up to {longest} "
                f"tokens, whose streams cannot be cut; set at least {longest}"
            )
        self.sequence_length, self.dtype = sequence_length, dtype
        self.shape = (cache.identity.num_streams, cache.identity.width)
        self.files = [_open_shard(cache.folder / name) for name in cache.files]
        self.stored = {"streams", "scales"}.intersection(self.files[0].keys())
        self.starts = np.cumsum([0, *(shard.counts["tokens"] for shard in cache.files.values())]).tolist()
        self.tokens = np.concatenate([file.get_tensor("tokens").numpy() for file in self.files])
        self.loss_mask = np.concatenate([file.get_tensor("loss_mask").numpy() for file in self.files])
        sizes = np.concatenate([file.get_tensor("piece_sizes").numpy() for file in self.files]).tolist()
        self.pieces: list[Piece] = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))
        self.order = RowOrder(on_rank0(lambda: pack_pieces(self.pieces, sequence_length)), batch_size, seed)

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchSource`; a piece counts as a document."""
        return self.tokens, np.array([start for start, _ in self.pieces])

    def batch(self, index: int) -> Batch:
        """Return this process's rows of batch `index`, with their streams."""
        rows = self.order.rank_rows(index)
        batch = fill_rows(self.tokens, rows, self.sequence_length, self.loss_mask)
        streams_BSND = torch.zeros(len(rows), self.sequence_length, *self.shape, dtype=self.dtype)
        for row, pieces in enumerate(rows):
            begin = 0
            for piece in pieces:
                streams_BSND[row, begin : begin + piece[1]] = self._streams(piece)
                begin += piece[1]
        return Batch(batch.tokens_BS, batch.segment_BS, batch.position_BS, batch.loss_mask_BS, streams_BSND)

    def _streams(self, piece: Piece) -> Tensor:
        """Return the streams of a piece, [S, N, D]; a piece lies in one shard."""
        start, size = piece
        shard = bisect.bisect_right(self.starts, start) - 1
        begin, file = start - self.starts[shard], self.files[shard]
        stored = {name: file.get_slice(name)[begin : begin + size] for name in self.stored}
        return decode_streams(stored, self.dtype)


def _open_shard(path: Path) -> Any:
    """Open a shard's tensors, mapped into memory."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"data.path={path.parent}: {path.name} cannot be read ({error}); restore the file") from None
