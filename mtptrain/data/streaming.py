"""`data.streaming=true`: training rows of text that is too long to hold, read as training needs them.

Documents are cut into pieces; the pieces of a bounded buffer are packed, the rows of the buffer shuffled, and the
buffer is filled anew. The rows depend on the data, the tokenizer and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import numpy as np

from mtptrain.config import DataConfig
from mtptrain.data.documents import Split, split_of
from mtptrain.data.encoder import Encoder
from mtptrain.data.packing import Batch, cut_document, fill_rows, pack_pieces
from mtptrain.data.text import iterate_text
from mtptrain.distributed import own_rows
from mtptrain.errors import UserError

BUFFER_ROWS = 512  # rows' worth of tokens that are packed and shuffled together

Marked = tuple[np.ndarray, np.ndarray]  # token ids of a piece, and which of them may be targets
Row = list[Marked]


class StreamedBatches:
    """Batches of documents that are read lazily; neither the text nor its tokens are ever held whole.

    Batches are meant to be asked for in order. A later number (a resumed run) is reached by reading on: exact, at the
    cost of tokenising what is skipped once more. An earlier number starts over.

    Args:
        config: where the documents are and how long a row is.
        encoder: the backbone's.
        batch_size: rows a batch, of all processes together.
        seed: of the order inside a buffer.
    """

    def __init__(self, config: DataConfig, encoder: Encoder, batch_size: int, seed: int) -> None:
        self.config = config
        self.encoder = encoder
        self.batch_size = batch_size
        self.seed = seed
        self._rows = self._all_rows()
        self._next_index = 0

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`; the data starts over without a gap, and a batch may span the seam.

        Raises:
            UserError: the data cannot be read, or holds no training document of two tokens or more.
        """
        if index < self._next_index:
            self._rows, self._next_index = self._all_rows(), 0
        skipped = (index - self._next_index) * self.batch_size
        rows = list(islice(self._rows, skipped, skipped + self.batch_size))
        rows = [rows[number] for number in own_rows(self.batch_size)]
        self._next_index = index + 1
        sizes = [len(piece) for row in rows for piece, _ in row]
        spans = zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False)
        tokens, spoken = (np.concatenate(parts) for parts in zip(*(one for row in rows for one in row), strict=True))
        return fill_rows(tokens, [list(islice(spans, len(row))) for row in rows], self.config.sequence_length, spoken)

    def _pieces(self) -> Iterator[Marked]:
        """Pieces of the training documents, once through the data."""
        config = self.config
        documents = (
            document
            for document in iterate_text(config)
            if split_of(document.name, config.heldout_every) is Split.train
        )
        for document in self.encoder.encode(documents):
            spoken = np.ones(len(document.tokens), bool) if document.spoken is None else document.spoken
            for start, size in cut_document(0, len(document.tokens), config.sequence_length):
                if size > 1:  # one token has no target
                    yield document.tokens[start : start + size], spoken[start : start + size]

    def _buffers(self) -> Iterator[list[Marked]]:
        """The pieces in groups of `BUFFER_ROWS` rows' worth of tokens."""
        pieces: list[Marked] = []
        num_tokens = 0
        for piece in self._pieces():
            pieces.append(piece)
            num_tokens += len(piece[0])
            if num_tokens >= BUFFER_ROWS * self.config.sequence_length:
                yield pieces
                pieces, num_tokens = [], 0
        if pieces:
            yield pieces

    def _all_rows(self) -> Iterator[Row]:
        """Rows without end, in the order they are trained on."""
        for epoch in count():
            is_empty = True
            for number, pieces in enumerate(self._buffers()):
                is_empty = False
                tokens, spoken = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
                sizes = [len(piece) for piece, _ in pieces]
                starts = np.cumsum([0, *sizes[:-1]]).tolist()
                rows = pack_pieces(list(zip(starts, sizes, strict=True)), self.config.sequence_length)
                for place in np.random.default_rng([self.seed, epoch, number]).permutation(len(rows)):
                    yield [(tokens[start : start + size], spoken[start : start + size]) for start, size in rows[place]]
            if is_empty:
                raise UserError(
                    f"data.path={self.config.path}: no training document with two tokens or more; one in "
                    f"data.heldout_every={self.config.heldout_every} is held out by hash of its name, so give more "
                    "documents or change that number"
                )
