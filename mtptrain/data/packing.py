"""Pack documents into rows of one length and keep their boundaries.

A document longer than a row is cut into pieces; a piece begins with the last token of the previous piece, so that every
token but a document's first is a target exactly once. A piece never attends to another one: it has its own segment
number, and its positions start at 0.
"""

# B rows, S tokens per row

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import torch

from mtptrain.batch import Batch
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.run.progress import counted

Piece = tuple[int, int]  # start and length in the corpus's token array
TOKENS_PER_FORWARD = 4096  # of a forward that measures


def cut_document(start: int, length: int, row_length: int) -> list[Piece]:
    """Return the pieces of a document, each of at most `row_length` tokens and overlapping the previous one by one.

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
    """Pack pieces into rows, longest first, each into a row with the least room that holds it (best fit).

    The result is deterministic. Pieces of one token have no target and are left out.
    """
    order = sorted((piece for piece in pieces if piece[1] > 1), key=lambda piece: (-piece[1], piece[0]))
    rows: list[list[Piece]] = []
    rooms: list[int] = []  # of the open rows, sorted, each number once
    rows_by_room: dict[int, list[int]] = {}
    for piece in order:
        size = piece[1]
        nearest = bisect_left(rooms, size)
        if nearest == len(rooms):
            rows.append([piece])
            index, left = len(rows) - 1, row_length - size
        else:
            room = rooms[nearest]
            index = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[nearest]
            rows[index].append(piece)
            left = room - size
        if left > 1:
            if left not in rows_by_room:
                insort(rooms, left)
            rows_by_room.setdefault(left, []).append(index)
    return rows


def pack_corpus(corpus: TokenizedCorpus, row_length: int, piece_length: int | None = None) -> list[list[Piece]]:
    """Cut a corpus into pieces of at most `piece_length` tokens (None = `row_length`) and pack them into rows."""
    pieces: list[Piece] = []
    for start, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        if end > start:
            pieces.extend(cut_document(start, end - start, piece_length or row_length))
    return pack_pieces(pieces, row_length)


def spread_rows(rows: list[list[Piece]], count: int | None) -> list[list[Piece]]:
    """Return at most `count` rows, spread evenly over `rows`; None = all rows."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def fill_rows(
    tokens: np.ndarray, rows: list[list[Piece]], row_length: int, loss_mask: np.ndarray | None = None
) -> Batch:
    """Return a batch made of rows of pieces.

    Two pieces "ab" and "c" in a row of 4: tokens [a, b, c, 0], segments [1, 1, 2, 0], positions [0, 1, 0, 0].

    Args:
        tokens: int32 token ids that the pieces index.
        rows: the pieces of each row.
        row_length: tokens per row.
        loss_mask: bool, True for each of `tokens` that may be a target; None = all may.
    """
    shape = (len(rows), row_length)
    tokens_BS, segment_BS, position_BS = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    loss_mask_BS = None if loss_mask is None else torch.zeros(shape, dtype=torch.bool)
    for index, pieces in enumerate(rows):
        begin = 0
        for number, (start, size) in enumerate(pieces, start=1):
            span = slice(begin, begin + size)
            tokens_BS[index, span] = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            segment_BS[index, span] = number
            position_BS[index, span] = torch.arange(size)
            if loss_mask is not None and loss_mask_BS is not None:
                loss_mask_BS[index, span] = torch.from_numpy(loss_mask[start : start + size])
            begin += size
    return Batch(tokens_BS, segment_BS, position_BS, loss_mask_BS)


def split_rows(tokens: np.ndarray, rows: list[list[Piece]], row_length: int) -> Iterator[Batch]:
    """Yield the rows of a measurement in batches of at most `TOKENS_PER_FORWARD` tokens, but of one row at least."""
    size = max(1, TOKENS_PER_FORWARD // row_length)
    for start in counted("measuring on held-out text", range(0, len(rows), size)):
        yield fill_rows(tokens, rows[start : start + size], row_length)
