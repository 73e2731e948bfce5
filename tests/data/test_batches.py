import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mtptrain.config import DataConfig, DataSource
from mtptrain.data.batches import PackedBatches
from mtptrain.data.documents import Split, split_of
from mtptrain.data.encoder import BATCH_DOCUMENTS, Encoder
from mtptrain.data.packing import Batch, pack_corpus
from mtptrain.data.streaming import BUFFER_ROWS, StreamedBatches
from mtptrain.data.text import text_documents
from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.data.tokens import TokenizedCorpus, tokenize_corpus
from mtptrain.errors import UserError

# S tokens a row

S = 16
MARKS = ([0], [1])


def same(left: Batch, right: Batch) -> bool:
    return (
        torch.equal(left.tokens_BS, right.tokens_BS)
        and torch.equal(left.segment_BS, right.segment_BS)
        and torch.equal(left.position_BS, right.position_BS)
    )


def packed_batches(seed: int = 0, batch_size: int = 3, num_documents: int = 29) -> PackedBatches:
    """Rows that hold one document each, so that the first token of a row names it."""
    corpus = TokenizedCorpus(
        np.arange(num_documents * S, dtype=np.int32), np.arange(num_documents + 1, dtype=np.int64) * S, 1
    )
    return PackedBatches(corpus, S, batch_size, seed)


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    in_order, single = packed_batches(), packed_batches()
    forward = [in_order.batch(index) for index in range(25)]
    for index in (24, 3, 11, 0):
        assert same(single.batch(index), forward[index])


def test_every_epoch_is_a_permutation_of_all_rows() -> None:
    batches = packed_batches()
    first_tokens = torch.cat([batches.batch(index).tokens_BS[:, 0] for index in range(29)]).tolist()
    epochs = [first_tokens[start : start + 29] for start in (0, 29, 58)]
    assert all(sorted(epoch) == list(range(0, 29 * S, S)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_another_order() -> None:
    assert not same(packed_batches(seed=0).batch(0), packed_batches(seed=1).batch(0))


def test_a_batch_may_be_larger_than_the_corpus() -> None:
    batch = packed_batches(batch_size=7, num_documents=3).batch(0)
    assert batch.tokens_BS.shape == (7, S)


@pytest.mark.parametrize("lengths", [[], [1, 1]])
def test_a_corpus_without_targets_is_refused(lengths: list[int]) -> None:
    corpus = TokenizedCorpus(np.zeros(sum(lengths), np.int32), np.cumsum([0, *lengths], dtype=np.int64), 1)
    with pytest.raises(UserError, match=r"data\.path"):
        PackedBatches(corpus, S, 1, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one two three four"], 280)


@pytest.fixture(scope="module")
def text_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """1,200 documents of 0 to 40 words: three buffers of `BUFFER_ROWS` rows."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    generator = np.random.default_rng(0)
    texts = [" ".join(map(str, generator.integers(0, 999, generator.integers(0, 41)))) for _ in range(1200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return DataConfig(source=DataSource.text, path=str(path), streaming=True, sequence_length=S, heldout_every=8)


def streamed(config: DataConfig, tokenizer: Tokenizer, seed: int = 0, batch_size: int = 64) -> StreamedBatches:
    return StreamedBatches(config, Encoder(tokenizer, MARKS), batch_size, seed)


def target_pairs(batch: Batch) -> list[tuple[int, int]]:
    rows, slots = batch.target_mask(0).nonzero(as_tuple=True)
    return list(zip(batch.tokens_BS[rows, slots].tolist(), batch.tokens_BS[rows, slots + 1].tolist(), strict=True))


def num_streamed_rows(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Rows of the first time through the data."""
    batches = streamed(config, tokenizer)
    total = 0
    for pieces in batches._buffers():
        sizes = [len(piece) for piece, _ in pieces]
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        total += len(pack_corpus(TokenizedCorpus(np.empty(offsets[-1], np.int32), offsets, 1), config.sequence_length))
    return total


def test_streaming_gives_the_same_batches_after_a_fresh_start(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    first, second = streamed(text_config, tokenizer), streamed(text_config, tokenizer)
    assert all(same(first.batch(index), second.batch(index)) for index in range(30))


def test_streaming_skips_ahead_to_the_batch_that_reading_on_gives(
    text_config: DataConfig, tokenizer: Tokenizer
) -> None:
    in_order, resumed = streamed(text_config, tokenizer), streamed(text_config, tokenizer)
    expected = [in_order.batch(index) for index in range(45)]
    assert same(resumed.batch(17), expected[17])
    assert same(resumed.batch(18), expected[18])
    assert same(resumed.batch(44), expected[44])


def test_streaming_starts_over_for_an_earlier_batch(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    batches = streamed(text_config, tokenizer)
    expected = [batches.batch(index) for index in range(12)]
    assert same(batches.batch(2), expected[2])
    assert same(batches.batch(2), expected[2])
    assert same(batches.batch(11), expected[11])


def test_streaming_shuffles_by_the_seed(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    batches = [streamed(text_config, tokenizer, seed=seed).batch(0) for seed in (0, 1)]
    assert not same(*batches)


def test_streaming_once_through_gives_the_targets_of_the_training_split(
    text_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus = tokenize_corpus(text_documents(text_config, Split.train), Encoder(tokenizer, MARKS), tmp_path)
    documents = [corpus.document(d).tolist() for d in range(corpus.num_documents)]
    expected = [pair for tokens in documents for pair in pairwise(tokens)]
    num_rows = num_streamed_rows(text_config, tokenizer)
    assert num_rows > 2 * BUFFER_ROWS
    batches = streamed(text_config, tokenizer, batch_size=1)
    found = [pair for index in range(num_rows) for pair in target_pairs(batches.batch(index))]
    assert sorted(found) == sorted(expected)


def test_streaming_starts_the_data_over_in_another_order(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    num_rows = num_streamed_rows(text_config, tokenizer)
    batches = streamed(text_config, tokenizer, batch_size=num_rows)
    first, second = batches.batch(0), batches.batch(1)
    assert not same(first, second)
    assert sorted(first.tokens_BS.tolist()) == sorted(second.tokens_BS.tolist())


def test_streaming_wastes_next_to_no_row(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    batch = streamed(text_config, tokenizer, batch_size=num_streamed_rows(text_config, tokenizer)).batch(0)
    assert (batch.segment_BS > 0).float().mean().item() > 0.98


def test_streaming_holds_a_bounded_buffer(text_config: DataConfig, tokenizer: Tokenizer) -> None:
    sizes = [sum(len(piece) for piece, _ in pieces) for pieces in streamed(text_config, tokenizer)._buffers()]
    assert len(sizes) >= 3
    assert max(sizes) < (BUFFER_ROWS + 1) * S


def test_streaming_leaves_files_beyond_the_buffer_unread(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "many words that fill rows " * 10
    for number in range(BATCH_DOCUMENTS * 2):
        (tmp_path / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "9999.txt").write_bytes(b"\xff\xff")  # reading it is an error
    config = DataConfig(source=DataSource.text, path=str(tmp_path), streaming=True, sequence_length=S)
    batches = streamed(config, tokenizer)
    assert batches.batch(0).tokens_BS.shape == (64, S)
    with pytest.raises(UserError, match=r"9999\.txt"):
        batches.batch(10_000)


def test_streaming_refuses_data_without_a_training_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = next(f"{n}.txt" for n in range(999) if split_of(f"{n}.txt", 2) is Split.heldout)
    (tmp_path / name).write_text("held out", encoding="utf-8")
    config = DataConfig(source=DataSource.text, path=str(tmp_path), streaming=True, heldout_every=2)
    with pytest.raises(UserError, match=r"data\.path=.*data\.heldout_every=2"):
        streamed(config, tokenizer).batch(0)
