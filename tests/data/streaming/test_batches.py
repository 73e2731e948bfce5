"""Streamed documents: none repeated, none lost, for any division of the rows and after any interruption."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from math import log2
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtptrain.data.documents import Split, split_of
from mtptrain.data.streaming.batches import StreamingBatches
from mtptrain.data.streaming.dataset import StreamingPlan, source_of
from mtptrain.data.streaming.row_stream import BUFFER_ROWS, Row, RowShape, RowStream, RowStreamPosition
from mtptrain.data.streaming.sharding import DocumentShardReader
from mtptrain.data.text import text_documents
from mtptrain.data.tokens import tokenize_corpus
from mtptrain.errors import UserError
from tests.data.streaming.sources import (
    ENCODER,
    TOKENIZER,
    S,
    micro_batches,
    mixed_config,
    plain,
    plan_of,
    text_config,
    write_lines,
)


def cut(num_rows: int, borders: list[int]) -> list[list[int]]:
    """Return the row numbers in consecutive parts, cut before each border."""
    limits = sorted({0, num_rows, *(border % num_rows for border in borders)})
    return [list(range(begin, end)) for begin, end in pairwise(limits)]


@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(1, 7),
    borders=st.lists(st.integers(0, 6), max_size=6),
    mixed=st.booleans(),
    seed=st.integers(0),
)
def test_any_division_of_the_rows_gives_the_same_batches(
    folder: Path, num_rows: int, borders: list[int], mixed: bool, seed: int
) -> None:
    """Ranks and workers are such a division."""
    plan = plan_of(mixed_config(folder) if mixed else text_config(folder), num_rows, seed)
    together, divided = (micro_batches(plan, parts) for parts in ([list(range(num_rows))], cut(num_rows, borders)))
    for (left, _), (right, _) in islice(zip(together, divided, strict=True), 90):
        assert left == right


@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(1, 7),
    borders=st.lists(st.integers(0, 6), max_size=6),
    mixed=st.booleans(),
    done=st.integers(1, 200),
)
def test_a_position_continues_with_the_batches_that_reading_on_gives(
    folder: Path, num_rows: int, borders: list[int], mixed: bool, done: int
) -> None:
    """Also under another division of the rows, and through the JSON of a checkpoint."""
    plan = plan_of(mixed_config(folder) if mixed else text_config(folder), num_rows)
    whole = micro_batches(plan, cut(num_rows, borders))
    *_, (_, position) = islice(whole, done)
    resumed = micro_batches(plan, [list(range(num_rows))], done, json.loads(json.dumps(position)))
    for (left, _), (right, _) in islice(zip(whole, resumed, strict=True), 40):
        assert left == right


def epoch_rows(plan: StreamingPlan, epoch: int) -> list[Row]:
    """Return all rows that the row streams of a single source have in an epoch."""
    (config,) = plan.sources.values()
    rows = []
    for number in range(plan.num_rows):
        row_stream = RowStream(
            number,
            DocumentShardReader(config, [number], plan.num_rows),
            ENCODER,
            plan.shape,
            plan.seed,
            RowStreamPosition(),
        )
        row = row_stream.next()
        while row_stream.position.epoch <= epoch:
            if row_stream.position.epoch == epoch:
                rows.append(row)
            row = row_stream.next()
    return rows


def pairs(rows: list[Row]) -> Counter[tuple[int, int]]:
    """Count the targets, each with the token before it."""
    return Counter(pair for row in rows for tokens, _ in row for pair in pairwise(tokens.tolist()))


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_an_epoch_gives_every_target_of_the_training_split_once(folder: Path, num_rows: int, tmp_path: Path) -> None:
    config = text_config(folder)
    corpus = tokenize_corpus(text_documents(config, Split.train), ENCODER, tmp_path)
    documents = [corpus.document(number).tolist() for number in range(len(corpus.offsets) - 1)]
    expected = Counter(pair for tokens in documents for pair in pairwise(tokens))
    first, second = (epoch_rows(plan_of(config, num_rows), epoch) for epoch in (0, 1))
    assert pairs(first) == pairs(second) == expected
    assert list(map(plain, first)) != list(map(plain, second))
    assert all(sum(len(tokens) for tokens, _ in row) <= S for row in first)


def test_rows_are_full_but_for_a_few(folder: Path) -> None:
    rows = epoch_rows(plan_of(text_config(folder), 1), 0)
    assert len(rows) > 3 * BUFFER_ROWS
    assert sum(len(tokens) for row in rows for tokens, _ in row) > 0.97 * S * len(rows)


def test_pieces_may_be_shorter_than_rows(folder: Path) -> None:
    plan = replace(plan_of(text_config(folder), 1), shape=RowShape(3 * S, 5))
    rows = epoch_rows(plan, 0)
    assert {len(tokens) for row in rows for tokens, _ in row} == {2, 3, 4, 5}
    assert pairs(rows) == pairs(epoch_rows(plan_of(text_config(folder), 1), 0))


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=5),
    num_rows=st.integers(1, 3000),
    every=st.integers(1, 12),
    number=st.integers(0, 11),
)
def test_a_source_has_its_share_of_the_rows_everywhere_in_the_batch(
    weights: list[float], num_rows: int, every: int, number: int
) -> None:
    """Within a few rows, over all rows and over row `number` of each batch of `every` rows."""
    for rows, slack in ((range(num_rows), 2.0), (range(number % every, num_rows * every, every), 2.0 * every)):
        counts = Counter(source_of(row, weights) for row in rows)
        for source, weight in enumerate(weights):
            # the discrepancy of a Kronecker sequence grows with the logarithm of its length
            assert abs(counts[source] - num_rows * weight / sum(weights)) <= slack * (1 + log2(num_rows))


def test_a_source_that_ends_starts_over_while_the_other_goes_on(folder: Path) -> None:
    """With three rows of talk to one of text, talk is read many times before text ends; it keeps its loss mask."""
    config = mixed_config(folder)
    config.mixture[1].weight = 7.5
    rows = [row for batch, _ in islice(micro_batches(plan_of(config, 2), [[0, 1]]), 200) for row in batch]
    talk = [row for row in rows if any(loss_mask is not None for _, loss_mask in row)]
    assert 0.7 < len(talk) / len(rows) < 0.8
    begun = Counter(TOKENIZER.decode(tokens) for row in talk for tokens, _ in row if tokens[0] == 0)
    assert min(begun.values()) >= 2
    for tokens, loss_mask in (piece for row in talk for piece in row):
        targets = TOKENIZER.decode([token for token, is_target in zip(tokens, loss_mask, strict=True) if is_target])
        assert "one" not in targets
        assert "user" not in targets


def test_files_are_not_read_before_they_are_needed(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "many words that fill rows " * 9}] * 600)
    (tmp_path / "b.jsonl").write_text('{"text": "cut', encoding="utf-8")
    config = replace(text_config(tmp_path), path=str(tmp_path))
    batches = micro_batches(plan_of(config, 2), [[0, 1]])
    assert len(next(batches)[0]) == 2
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 is not JSON"):
        *_, _ = islice(batches, 60_000)


def test_a_source_of_fewer_documents_than_rows_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has \d+ training documents.*train\.batch_size=300 rows.*lower train"):
        StreamingBatches(plan_of(text_config(folder), 300), 0)


def test_data_without_a_training_document_is_refused(tmp_path: Path) -> None:
    name = next(f"{n}.txt" for n in range(999) if split_of(f"{n}.txt", 2) is Split.heldout)
    (tmp_path / name).write_text("held out", encoding="utf-8")
    config = replace(text_config(tmp_path), path=str(tmp_path), heldout_every=2)
    with pytest.raises(UserError, match=r"data\.path=.*data\.heldout_every=2"):
        StreamingBatches(plan_of(config, 2), 0)


def test_documents_of_one_token_are_no_data(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "0"}] * 50)
    encoder = replace(ENCODER, bos_eos=([], []))
    plan = replace(plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2), encoder=encoder)
    with pytest.raises(UserError, match="no training document with two tokens or more"):
        next(micro_batches(plan, [[0, 1]]))


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_position_in_other_files_is_refused(change: str, tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(40)])
    plan = plan_of(replace(text_config(tmp_path), path=str(tmp_path)), 2)
    _, position = next(micro_batches(plan, [[0, 1]]))
    path = tmp_path / "b.jsonl"
    path.unlink() if change == "gone" else path.write_text(path.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not what the interrupted run read"):
        next(micro_batches(plan, [[0, 1]], 1, position))
