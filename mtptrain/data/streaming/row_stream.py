"""Row streams: the documents of one row of the micro-batch, cut, packed and shuffled a buffer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtptrain.data.packing import cut_document, pack_pieces
from mtptrain.data.streaming.sharding import DocumentIndex, DocumentShardReader, check_enough
from mtptrain.data.tokens import EncodedDocument, Encoder

# R rows of a buffer

BUFFER_ROWS = 64  # rows' worth of tokens that are packed and shuffled together

MaskedPiece = tuple[np.ndarray, np.ndarray | None]  # int32 token ids, and their loss mask; None = all are targets
Row = list[MaskedPiece]


@dataclass(slots=True)
class RowStreamPosition:
    """The progress of a row stream.

    Attributes:
        epoch, number: the first document of the current buffer.
        buffer: number of buffers before the current one.
        taken: rows already taken from the current buffer.
    """

    epoch: int = 0
    number: int = 0
    buffer: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True)
class RowShape:
    """The size of rows and pieces.

    Attributes:
        row_length: tokens per row.
        piece_length: maximum tokens of one document in a row; longer documents are cut.
    """

    row_length: int
    piece_length: int


class RowStream:
    """An endless sequence of rows, determined by its documents, the encoder, the shape and the seed alone.

    Args:
        row_number: its row of the micro-batch.
        reader: supplies its documents.
        encoder: turns documents into tokens.
        shape: size of the rows.
        seed: seed of the row order within a buffer.
        position: where to resume; updated with every row.
    """

    def __init__(
        self,
        row_number: int,
        reader: DocumentShardReader,
        encoder: Encoder,
        shape: RowShape,
        seed: int,
        position: RowStreamPosition,
    ) -> None:
        self.row_number, self.reader, self.encoder, self.shape, self.seed = row_number, reader, encoder, shape, seed
        self.position = position
        self.rows: list[Row] | None = None

    def next(self) -> Row:
        """Return the next row.

        Raises:
            UserError: the documents cannot be read, or none has two tokens or more.
        """
        if self.rows is None:
            self.rows = self._fill()
        while self.position.taken >= len(self.rows):
            self.position.buffer, self.position.taken = self.position.buffer + 1, 0
            self.rows = self._fill()
        self.position.taken += 1
        return self.rows[self.position.taken - 1]

    def _fill(self) -> list[Row]:
        """Return the rows of the next buffer in training order; the last buffer of an epoch may be smaller."""
        pieces: list[MaskedPiece] = []
        first: DocumentIndex | None = None
        num_tokens = num_ends = 0
        while num_tokens < BUFFER_ROWS * self.shape.row_length:
            index, document = self.reader.next(self.row_number)
            if document is None:
                num_ends += 1
                if pieces:
                    break
                if num_ends == 2:  # a whole epoch without a piece
                    check_enough(self.reader.config, 0, self.reader.num_rows)
                continue
            first = first or index
            for encoded in self.encoder.encode([document], self.reader.bad_rows):
                for piece in _pieces(encoded, self.shape.piece_length):
                    pieces.append(piece)
                    num_tokens += len(piece[0])
        assert first is not None
        self.position.epoch, self.position.number = first
        packed = pack_pieces(list(enumerate(len(tokens) for tokens, _ in pieces)), self.shape.row_length)
        order_R = np.random.default_rng([self.seed, self.row_number, self.position.buffer]).permutation(len(packed))
        return [[pieces[number] for number, _ in packed[row]] for row in order_R]


def _pieces(document: EncodedDocument, piece_length: int) -> Iterator[MaskedPiece]:
    """Yield the pieces of a document that contain a target."""
    for start, size in cut_document(0, len(document.tokens), piece_length):
        if size > 1:
            span = slice(start, start + size)
            yield document.tokens[span], None if document.loss_mask is None else document.loss_mask[span]
