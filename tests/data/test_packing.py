import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtptrain.batch import Batch
from mtptrain.data.packing import Piece, cut_document, fill_rows, pack_corpus, pack_pieces
from mtptrain.data.tokens import TokenizedCorpus

# S tokens per row

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)
ROW_LENGTHS = st.integers(2, 17)


def corpus_of(lengths: list[int]) -> TokenizedCorpus:
    """Return a corpus with the token ids 0, 1, 2, ..., so that an id is a position in the corpus."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenizedCorpus(np.arange(offsets[-1], dtype=np.int32), offsets, int(offsets[-1]))


def packed(lengths: list[int], S: int) -> Batch:
    corpus = corpus_of(lengths)
    return fill_rows(corpus.tokens, pack_corpus(corpus, S), S)


def targets(batch: Batch, step: int) -> list[int]:
    rows, slots = batch.target_mask(step).nonzero(as_tuple=True)
    return batch.tokens_BS[rows, slots + step + 1].tolist()


@given(length=st.integers(1, 200), S=ROW_LENGTHS)
def test_pieces_overlap_by_one_token_and_end_with_the_document(length: int, S: int) -> None:
    pieces = cut_document(7, length, S)
    ends = [start + size for start, size in pieces]
    assert pieces[0][0] == 7
    assert [start for start, _ in pieces[1:]] == [end - 1 for end in ends[:-1]]
    assert ends[-1] == 7 + length


@given(length=st.integers(2, 200), S=ROW_LENGTHS)
def test_every_piece_but_the_last_fills_a_row(length: int, S: int) -> None:
    *full, last = cut_document(0, length, S)
    assert all(size == S for _, size in full)
    assert 2 <= last[1] <= S


@given(lengths=LENGTHS, S=ROW_LENGTHS)
@settings(max_examples=50, deadline=None)
def test_every_token_but_a_documents_first_is_a_target_exactly_once(lengths: list[int], S: int) -> None:
    corpus = corpus_of(lengths)
    expected = [token for d in range(len(lengths)) for token in corpus.document(d)[1:].tolist()]
    rows = pack_corpus(corpus, S)
    actual = targets(fill_rows(corpus.tokens, rows, S), step=0) if rows else []
    assert sorted(actual) == expected


@given(lengths=LENGTHS, S=ROW_LENGTHS)
@settings(max_examples=50, deadline=None)
def test_no_row_is_longer_than_the_row_length(lengths: list[int], S: int) -> None:
    for row in pack_corpus(corpus_of(lengths), S):
        assert 2 <= sum(size for _, size in row) <= S


@given(lengths=LENGTHS, S=ROW_LENGTHS)
@settings(max_examples=50, deadline=None)
def test_at_most_one_row_is_less_than_half_full(lengths: list[int], S: int) -> None:
    fills = [sum(size for _, size in row) for row in pack_corpus(corpus_of(lengths), S)]
    assert sum(2 * fill < S for fill in fills) <= 1


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), S=ROW_LENGTHS, step=st.integers(0, 8))
@settings(max_examples=80, deadline=None)
def test_a_mask_marks_the_anchors_whose_target_lies_in_their_own_piece(lengths: list[int], S: int, step: int) -> None:
    batch = packed(lengths, S)
    mask_BS = batch.target_mask(step)
    segments = batch.segment_BS.tolist()
    for row, numbers in enumerate(segments):
        for slot, number in enumerate(numbers):
            target = slot + step + 1
            inside = number > 0 and target < S and numbers[target] == number
            assert mask_BS[row, slot].item() == inside


def test_shallow_steps_keep_the_targets_at_the_tail_that_deep_steps_lack() -> None:
    batch = packed([5], S=8)
    assert [batch.target_mask(step)[0].sum().item() for step in range(6)] == [4, 3, 2, 1, 0, 0]
    assert targets(batch, step=2) == [3, 4]


def test_a_mask_deeper_than_the_row_is_empty() -> None:
    batch = packed([3], S=3)
    assert not batch.target_mask(2).any()
    assert not batch.target_mask(9).any()


@pytest.mark.parametrize("lengths", [[0], [1], [0, 1, 1]])
def test_documents_shorter_than_two_tokens_make_no_row(lengths: list[int]) -> None:
    assert pack_corpus(corpus_of(lengths), 4) == []


@pytest.mark.parametrize(("lengths", "num_rows"), [([8], 1), ([9], 2), ([15], 2), ([5, 3], 1), ([4, 4, 6, 2], 2)])
def test_pieces_that_fit_exactly_leave_no_padding(lengths: list[int], num_rows: int) -> None:
    rows = pack_corpus(corpus_of(lengths), 8)
    assert len(rows) == num_rows
    if lengths != [9]:  # its second piece is the two tokens [7, 8]
        assert all(sum(size for _, size in row) == 8 for row in rows)


def test_positions_restart_with_every_piece_and_padding_is_zero() -> None:
    batch = fill_rows(np.arange(10, 20, dtype=np.int32), [[(0, 3), (5, 2)], [(8, 2)]], 6)
    assert batch.tokens_BS.tolist() == [[10, 11, 12, 15, 16, 0], [18, 19, 0, 0, 0, 0]]
    assert batch.segment_BS.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]


@given(lengths=LENGTHS, S=ROW_LENGTHS)
@settings(max_examples=30, deadline=None)
def test_packing_does_not_depend_on_the_order_of_the_pieces(lengths: list[int], S: int) -> None:
    pieces = [(100 * number, min(length, S)) for number, length in enumerate(lengths)]
    assert pack_pieces(pieces, S) == pack_pieces(pieces[::-1], S)


def best_fit_reference(pieces: list[Piece], S: int) -> list[list[Piece]]:
    """Each piece, longest first, into the row with the least room that holds it; of equal rows the newest."""
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # room and number of rows, the row that was filled last at the end
    for piece in sorted((piece for piece in pieces if piece[1] > 1), key=lambda piece: (-piece[1], piece[0])):
        fitting = [(room, -place) for place, (room, _) in enumerate(rooms) if room >= piece[1]]
        room, row = rooms.pop(-min(fitting)[1]) if fitting else (S, len(rows))
        rows[row:] = [[*rows[row], piece], *rows[row + 1 :]] if row < len(rows) else [[piece]]
        rooms.append((room - piece[1], row))
    return rows


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60), S=st.integers(2, 50))
@settings(max_examples=100, deadline=None)
def test_packing_is_best_fit(lengths: list[int], S: int) -> None:
    pieces = [(100 * number, min(length, S)) for number, length in enumerate(lengths)]
    assert pack_pieces(pieces, S) == best_fit_reference(pieces, S)


@pytest.mark.parametrize("S", [64, 2**30])
def test_packing_does_not_scan_the_row(S: int) -> None:
    """With a scan, the second row length would take an hour."""
    pieces = [(number, 2 + number % 31) for number in range(2000)]
    rows = pack_pieces(pieces, S)
    assert sorted(piece for row in rows for piece in row) == pieces
    assert sum(size for _, size in pieces) <= len(rows) * S < 1.1 * sum(size for _, size in pieces) + S


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = packed([5], S=8).to(torch.device("meta"))
    assert {t.device.type for t in (batch.tokens_BS, batch.segment_BS, batch.position_BS)} == {"meta"}


def test_draft_steps_count_only_where_all_drafted_tokens_may_be_targets() -> None:
    loss_mask = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1], bool)
    batch = fill_rows(np.arange(9, dtype=np.int32), [[(0, 6), (6, 3)]], 10, loss_mask)
    for step in range(4):
        ahead = range(1, 2) if step == 0 else range(2, step + 2)
        ends = [6] * 6 + [9] * 3
        expected = [i + step + 1 < end and all(loss_mask[i + j] for j in ahead) for i, end in enumerate(ends)]
        assert batch.target_mask(step)[0].tolist() == [*expected, False]
