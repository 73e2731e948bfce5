"""Which rows make the batch of a training step: a function of seed and step alone, so that resuming needs no state."""

from __future__ import annotations

import numpy as np

from mtptrain.data.packing import Batch, Piece, fill_rows, pack_corpus
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.distributed import own_rows
from mtptrain.errors import UserError


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
        self.batch_size = batch_size
        self.seed = seed
        self.rows: list[list[Piece]] = pack_corpus(corpus, sequence_length)
        if not self.rows:
            raise UserError("data: there is no document with two tokens or more to train on; check data.path")
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`; epochs follow each other without a gap, and a batch may span two."""
        rows = []
        for row in own_rows(self.batch_size):
            epoch, place = divmod(index * self.batch_size + row, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            rows.append(self.rows[self._order[place]])
        return fill_rows(self.corpus.tokens, rows, self.sequence_length)
