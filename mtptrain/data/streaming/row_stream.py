"""The rows of one place in the batch: documents cut, packed and shuffled a buffer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtptrain.data.packing import cut_document, pack_pieces
from mtptrain.data.streaming.sharding import DocumentShardReader, Order, check_enough
from mtptrain.data.tokens import EncodedDocument, Encoder

BUFFER_ROWS = 64  # rows' worth of tokens that are packed and shuffled together

MaskedPiece = tuple[np.ndarray, np.ndarray | None]  # token ids, and which of them may be targets
Row = list[MaskedPiece]


@dataclass(slots=True)
class RowStreamPosition:
    """How far a lane has come.

    Attributes:
        epoch, number: the document that its buffer begins with.
        buffer: how many buffers came before.
        taken: rows taken of it.
    """

    epoch: int = 0
    number: int = 0
    buffer: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True)
class RowShape:
    """How long rows are.

    Attributes:
        row_length: tokens a row.
        piece_length: most tokens of a document in a row; what is longer is cut.
    """

    row_length: int
    piece_length: int


class RowStream:
    """Rows without end. They depend on its documents, the encoder, the shape and the seed alone.

    Args:
        lane: its number.
        dealer: gives it its documents.
        encoder: turns them into tokens.
        shape: of the rows.
        seed: of the order inside a buffer.
        place: where it goes on.
    """

    def __init__(
        self,
        lane: int,
        dealer: DocumentShardReader,
        encoder: Encoder,
        shape: RowShape,
        seed: int,
        place: RowStreamPosition,
    ) -> None:
        self.lane, self.dealer, self.encoder, self.shape, self.seed = lane, dealer, encoder, shape, seed
        self.place = place
        self.rows: list[Row] | None = None

    def row(self) -> Row:
        """The next row.

        Raises:
            UserError: the documents cannot be read, or none has two tokens or more.
        """
        if self.rows is None:
            self.rows = self._fill()
        while self.place.taken >= len(self.rows):
            self.place.buffer, self.place.taken = self.place.buffer + 1, 0
            self.rows = self._fill()
        self.place.taken += 1
        return self.rows[self.place.taken - 1]

    def _fill(self) -> list[Row]:
        """The rows of the next buffer, in the order they are trained on; an epoch's last buffer may be smaller."""
        pieces: list[MaskedPiece] = []
        begin: Order | None = None
        num_tokens = num_ends = 0
        while num_tokens < BUFFER_ROWS * self.shape.row_length:
            order, document = self.dealer.next(self.lane)
            if document is None:
                num_ends += 1
                if pieces:
                    break
                if num_ends == 2:
                    check_enough(self.dealer.config, 0, self.dealer.num_rows)
                continue
            begin = begin or order
            for piece in _pieces(next(self.encoder.encode([document])), self.shape.piece_length):
                pieces.append(piece)
                num_tokens += len(piece[0])
        assert begin is not None
        self.place.epoch, self.place.number = begin
        packed = pack_pieces(list(enumerate(len(tokens) for tokens, _ in pieces)), self.shape.row_length)
        order_R = np.random.default_rng([self.seed, self.lane, self.place.buffer]).permutation(len(packed))
        return [[pieces[number] for number, _ in packed[row]] for row in order_R]


def _pieces(document: EncodedDocument, piece_length: int) -> Iterator[MaskedPiece]:
    """Pieces of a document that have a target."""
    for start, size in cut_document(0, len(document.tokens), piece_length):
        if size > 1:
            part = slice(start, start + size)
            yield document.tokens[part], None if document.loss_mask is None else document.loss_mask[part]
