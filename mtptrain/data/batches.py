"""The batch of a training step; for a tokenised corpus, a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mtptrain.batch import Batch
from mtptrain.data.files import Position
from mtptrain.data.packing import Piece, fill_rows, pack_corpus
from mtptrain.data.passages import Passages
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run.distributed import on_rank0, rank_rows


class BatchSource:
    """Micro-batches by number.

    Attributes:
        names: names of the sources if there are several, else empty; tokens are counted by source.
    """

    names: Sequence[str] = ()

    def batch(self, index: int) -> Batch:
        """Return this process's rows of micro-batch `index`; see `distributed.rank_rows`."""
        raise NotImplementedError

    def position(self) -> Position:
        """Return this process's position in the data, as plain values; {} if the micro-batch number is enough."""
        return {}

    def await_batches(self, end: int, is_stopped: Callable[[], bool]) -> bool:
        """Wait until the micro-batches before number `end` can be read; every process calls it.

        Returns:
            Whether they can; if not, `is_stopped()` has ended the wait on some process.

        Raises:
            UserError: on every process: they did not appear in time, or there are no more.
        """
        return True

    def saved(self) -> None:
        """Delete data that neither this run nor a resume from its new checkpoint needs; every process calls it."""

    def documents(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return all training text as tokens with the start of each document; None if it is read during training."""
        return None

    def passages(self) -> Passages | None:
        """Return the passages of all text that was trained on; None if they are not kept. Every process calls it."""
        return None

    def close(self) -> None:
        """Stop background workers; no batch may be requested afterwards."""

    def restart(self, index: int, passages: Passages | None = None) -> None:
        """Begin the data at micro-batch `index`, whose predecessors were of other data, with these passages."""

    def seek(self, index: int, positions: list[Position], passages: Passages | None = None) -> None:
        """Resume at micro-batch `index` from the positions of all processes of the interrupted run and its passages.

        Raises:
            UserError: the positions belong to other data.
        """
        if positions:
            raise UserError(
                "data.streaming=false: the interrupted run read its data as a stream; set data.streaming and "
                "data.mixture as they were, or start in another output_dir"
            )


class RowOrder:
    """The rows of every batch: each epoch holds all rows, in a new order.

    Args:
        rows: the pieces of each row.
        batch_size: rows per batch, over all processes.
        seed: seed of the order.

    Raises:
        UserError: there are no rows.
    """

    def __init__(self, rows: list[list[Piece]], batch_size: int, seed: int) -> None:
        if not rows:
            raise UserError("data: there is no document with two tokens or more to train on; check data.path")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def rank_rows(self, index: int) -> list[list[Piece]]:
        """Return this process's rows of batch `index`; epochs follow without a gap, and a batch may span two."""
        rows = []
        for row in rank_rows(self.batch_size):
            epoch, number = divmod(index * self.batch_size + row, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            rows.append(self.rows[self._order[number]])
        return rows


class PackedBatches(BatchSource):
    """Batches of a tokenised corpus, shuffled anew each epoch; rank 0 packs the rows for all processes.

    Args:
        corpus: the documents.
        sequence_length: tokens per row.
        batch_size: rows per batch, over all processes.
        seed: seed of the order.
        piece_length: maximum tokens of one document in a row; None = sequence_length.

    Raises:
        UserError: the corpus has no piece of two tokens or more.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        sequence_length: int,
        batch_size: int,
        seed: int,
        piece_length: int | None = None,
    ) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        rows = on_rank0(lambda: pack_corpus(corpus, sequence_length, piece_length))
        self.order = RowOrder(rows, batch_size, seed)

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchSource`."""
        return self.corpus.tokens, self.corpus.offsets[:-1]

    def batch(self, index: int) -> Batch:
        """Return this process's rows of batch `index`."""
        return fill_rows(self.corpus.tokens, self.order.rank_rows(index), self.sequence_length, self.corpus.loss_mask)
