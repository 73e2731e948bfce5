"""Which rows make the batch of a training step: a function of seed and step alone, so that resuming needs no state."""

from __future__ import annotations

import numpy as np

from mtptrain.data.packing import Batch, Piece, fill_rows, pack_corpus
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.distributed import own_rows
from mtptrain.errors import UserError


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
        for row in own_rows(self.batch_size):
            epoch, place = divmod(index * self.batch_size + row, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            found.append(self.rows[self._order[place]])
        return found


class PackedBatches:
    """Batches of a tokenised corpus, shuffled anew each epoch.

    Args:
        corpus: the documents.
        sequence_length: tokens a row.
        batch_size: rows a batch, of all processes together.
        seed: of the order.
    Raises:
        UserError: the corpus has no piece of two tokens or more.
    """

    def __init__(self, corpus: TokenizedCorpus, sequence_length: int, batch_size: int, seed: int) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.order = RowOrder(pack_corpus(corpus, sequence_length), batch_size, seed)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`."""
        return fill_rows(self.corpus.tokens, self.order.own(index), self.sequence_length, self.corpus.spoken)
