"""Which rows make the batch of a training step; where all are at hand, a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtptrain.batch import Batch
from mtptrain.data.packing import Piece, fill_rows, pack_corpus
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run.distributed import rank_rows


class BatchSource:
    """Micro-batches by number.

    Attributes:
        names: of the sources that rows come from, where there are several; tokens are counted by source.
    """

    names: Sequence[str] = ()

    def batch(self, index: int) -> Batch:
        """The rows of micro-batch `index` that fall to this process; see `distributed.rank_rows`."""
        raise NotImplementedError

    def position(self) -> dict[str, Any]:
        """Where this process is in the data, as plain values; {} where a number says it all."""
        return {}

    def close(self) -> None:
        """Let go of what was opened to read ahead; there is no batch after this."""

    def seek(self, index: int, positions: list[dict[str, Any]]) -> None:
        """Go on with micro-batch `index`, from the positions of all processes of the run that came to it.

        Raises:
            UserError: they are not positions in this data.
        """
        if positions:
            raise UserError(
                "data.streaming=False: the interrupted run read its data as a stream; set data.streaming and "
                "data.mixture as they were, or start in another output_dir"
            )


class RowOrder:
    """Which rows make a batch: all of them in every epoch, in an order of its own.

    Args:
        rows: of pieces.
        batch_size: rows a batch, of all processes together.
        seed: of the order.
    Raises:
        UserError: there is no row.
    """

    def __init__(self, rows: list[list[Piece]], batch_size: int, seed: int) -> None:
        if not rows:
            raise UserError("data: there is no document with two tokens or more to train on; check data.path")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def own(self, index: int) -> list[list[Piece]]:
        """This process's rows of batch `index`; epochs follow each other without a gap, and a batch may span two."""
        found = []
        for row in rank_rows(self.batch_size):
            epoch, place = divmod(index * self.batch_size + row, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            found.append(self.rows[self._order[place]])
        return found


class PackedBatches(BatchSource):
    """Batches of a tokenised corpus, shuffled anew each epoch.

    Args:
        corpus: the documents.
        sequence_length: tokens a row.
        batch_size: rows a batch, of all processes together.
        seed: of the order.
        piece_length: most tokens of a document in a row; None = a row's.
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
        self.order = RowOrder(pack_corpus(corpus, sequence_length, piece_length), batch_size, seed)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`."""
        return fill_rows(self.corpus.tokens, self.order.own(index), self.sequence_length, self.corpus.loss_mask)
