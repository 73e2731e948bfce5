"""Documents as rows of one length, boundaries kept.

A document longer than a row is cut into pieces; a piece begins with the last token of the piece before, so that every
token but a document's first is a target exactly once. A piece never sees another one: it has a segment number of its
own, and positions that start at 0.
"""

# B rows, S tokens a row

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtptrain.data.tokens import TokenizedCorpus


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows.

    Attributes:
        tokens_BS: int64 token ids; 0 in padding.
        segment_BS: int64, 1, 2, ... for the pieces of a row, 0 in padding.
        position_BS: int64 position inside the piece.
        spoken_BS: bool, which tokens may be targets; None where all may.
        streams_BSND: the backbone's streams of N times D channels, zeros in padding, where they come from a cache.
        source_B: int64, which source of a mixture a row comes from; None where there is one.
    """

    tokens_BS: Tensor
    segment_BS: Tensor
    position_BS: Tensor
    spoken_BS: Tensor | None = None
    streams_BSND: Tensor | None = None
    source_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return Batch(**{name: part.to(device) for name, part in parts.items() if part is not None})

    def source_tokens(self, num_sources: int) -> Tensor:
        """Tokens of the rows of each source, padding left out, float64 [num_sources]."""
        sizes_B = (self.segment_BS > 0).sum(1).double()
        source_B = torch.zeros_like(self.segment_BS[:, 0]) if self.source_B is None else self.source_B
        return sizes_B.new_zeros(num_sources).index_add(0, source_B, sizes_B)

    def target_mask(self, step: int) -> Tensor:
        """Anchors whose draft step `step` (1-based) has its target token t_{i+step+1} inside the piece, bool [B, S].

        `step=0` marks the backbone's own targets t_{i+1}. Where only some tokens may be targets, all that the steps up
        to this one draft must be such tokens: a draft whose beginning is somebody else's word is never asked for.
        """
        shift = step + 1
        mask_BS = torch.zeros_like(self.segment_BS, dtype=torch.bool)
        same = self.segment_BS[:, shift:] == self.segment_BS[:, :-shift]
        mask_BS[:, :-shift] = same & (self.segment_BS[:, :-shift] > 0)
        if self.spoken_BS is not None:
            for ahead in range(min(2, shift), shift + 1):
                mask_BS &= self.spoken_BS.roll(-ahead, dims=1)
        return mask_BS


Piece = tuple[int, int]  # start and length in the corpus's token array


def cut_document(start: int, length: int, row_length: int) -> list[Piece]:
    """Pieces of one document, each at most `row_length` tokens, each overlapping the one before by one token.

    (0, 5, row_length=3) -> [(0, 3), (2, 3)]
    """
    pieces = [(start, min(length, row_length))]
    done = pieces[0][1]
    while done < length:
        size = min(length - done + 1, row_length)
        pieces.append((start + done - 1, size))
        done += size - 1
    return pieces


def pack_pieces(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    """Rows of pieces, deterministic: longest first, each into a row with the least room that holds it (best fit).

    Pieces of one token have no target and are left out.
    """
    order = sorted((piece for piece in pieces if piece[1] > 1), key=lambda piece: (-piece[1], piece[0]))
    rows: list[list[Piece]] = []
    rows_by_room: dict[int, list[int]] = {}
    for piece in order:
        size = piece[1]
        room = next((room for room in range(size, row_length + 1) if rows_by_room.get(room)), None)
        if room is None:
            rows.append([piece])
            index, left = len(rows) - 1, row_length - size
        else:
            index = rows_by_room[room].pop()
            rows[index].append(piece)
            left = room - size
        if left > 1:
            rows_by_room.setdefault(left, []).append(index)
    return rows


def pack_corpus(corpus: TokenizedCorpus, row_length: int, piece_length: int | None = None) -> list[list[Piece]]:
    """Rows of pieces that cover a corpus; no piece is longer than `piece_length`, or than a row where it is None."""
    pieces: list[Piece] = []
    for start, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        if end > start:
            pieces.extend(cut_document(start, end - start, piece_length or row_length))
    return pack_pieces(pieces, row_length)


def spread_rows(rows: list[list[Piece]], count: int | None) -> list[list[Piece]]:
    """At most `count` rows, spread evenly; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def fill_rows(tokens: np.ndarray, rows: list[list[Piece]], row_length: int, spoken: np.ndarray | None = None) -> Batch:
    """A batch from rows of pieces.

    Two pieces "ab" and "c" in a row of 4: tokens [a, b, c, 0], segments [1, 1, 2, 0], positions [0, 1, 0, 0].

    Args:
        tokens: int32, what the pieces are pieces of.
        rows: of pieces.
        row_length: tokens a row.
        spoken: bool, which of `tokens` may be targets; None where all may.
    """
    shape = (len(rows), row_length)
    tokens_BS, segment_BS, position_BS = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    spoken_BS = None if spoken is None else torch.zeros(shape, dtype=torch.bool)
    for index, pieces in enumerate(rows):
        begin = 0
        for number, (start, size) in enumerate(pieces, start=1):
            span = slice(begin, begin + size)
            tokens_BS[index, span] = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            segment_BS[index, span] = number
            position_BS[index, span] = torch.arange(size)
            if spoken is not None and spoken_BS is not None:
                spoken_BS[index, span] = torch.from_numpy(spoken[start : start + size])
            begin += size
    return Batch(tokens_BS, segment_BS, position_BS, spoken_BS)
