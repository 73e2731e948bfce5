"""Passages of the training text: copies are found under any name and white space, and the sample is bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtptrain.batch import Batch
from mtptrain.data import passages
from mtptrain.data.batches import BatchSource, PackedBatches
from mtptrain.data.documents import Document
from mtptrain.data.passages import (
    WINDOW,
    PassageHasher,
    Passages,
    join_passages,
    passage_hashes,
    read_passages,
)
from mtptrain.data.recorded import RecordedBatches
from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.data.tokens import Encoder, TokenizedCorpus, tokenize_corpus
from mtptrain.evaluation.head_result import SeenPrompts
from mtptrain.evaluation.heads import count_seen
from tests.conftest import corpus_texts

VOCAB_SIZE = 300
TOKENIZER = train_tokenizer(corpus_texts(), VOCAB_SIZE)
HASHER = PassageHasher(TOKENIZER, VOCAB_SIZE)
TEXTS = [f"{text} {number} 数 word{number * 7919} and some more of it\n" for number, text in enumerate(corpus_texts())]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def corpus_of(texts: list[str], folder: Path) -> TokenizedCorpus:
    return tokenize_corpus(
        [Document(str(n), text) for n, text in enumerate(texts)], Encoder(TOKENIZER, ([0], [1])), folder
    )


def passages_of(texts: list[str]) -> Passages:
    parts = [ids(text) for text in texts]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    return HASHER.documents(np.concatenate(parts), starts)


@pytest.mark.parametrize(
    "change", [str.upper, lambda text: text.replace(" ", "\n  "), lambda text: text[20:], lambda text: "new " + text]
)
def test_a_copy_of_a_document_is_found(change: object) -> None:
    assert callable(change)
    trained = passages_of(TEXTS[:30])
    assert [trained.share_of(HASHER.prompt([0, *ids(change(text))])) >= 0.9 for text in TEXTS[:30]] == [True] * 30


def test_other_documents_are_not_found() -> None:
    trained = passages_of([text.replace("the", "a") for text in TEXTS[:30]])
    shares = [
        trained.share_of(HASHER.prompt(ids(f"{number} entirely other words {number * 31} 数"))) for number in range(9)
    ]
    assert shares == [0.0] * 9
    assert Passages.none().share_of(HASHER.prompt(ids(TEXTS[0]))) == 0.0


def test_a_prompt_shorter_than_a_passage_is_found_at_the_start_of_a_document_only() -> None:
    trained = passages_of(["Why is it so? Because it is, and has always been.", "x"])
    asked = [trained.share_of(HASHER.prompt(ids(text))) for text in ("Why is it so?", "Because it is", "X", "y")]
    assert asked == [1.0, 0.0, 1.0, 0.0]
    assert trained.share_of(HASHER.prompt([0])) is None


def test_characters_of_several_tokens_are_told_apart() -> None:
    trained = passages_of(["数" * 20])
    assert trained.share_of(HASHER.prompt(ids("数" * 20))) == 1.0
    assert trained.share_of(HASHER.prompt(ids("文" * 20))) == 0.0


def test_equal_bytes_have_equal_hashes_wherever_they_stand() -> None:
    text = np.frombuffer(bytes(range(1, 100)) * 2, np.uint8)
    hashes = passage_hashes(text)
    assert len(hashes) == len(text) - WINDOW + 1
    assert (hashes[:30] == hashes[99:129]).all()
    assert len(np.unique(hashes[:99])) == 99


def test_the_sample_is_bounded_uniform_and_independent_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = passages_of(TEXTS)
    monkeypatch.setattr(passages, "LIMIT", 300)
    parts = [passages_of(TEXTS[start : start + 7]) for start in range(0, len(TEXTS), 7)]
    sample, backwards = join_passages(parts), join_passages(parts[::-1])
    assert 150 < len(sample.hashes) <= 300
    assert (sample.bits, sample.hashes.tolist()) == (backwards.bits, backwards.hashes.tolist())
    assert sample.hashes.tolist() == [one for one in whole.hashes.tolist() if one < 2 ** (64 - sample.bits)]
    assert len(sample.hashes) == pytest.approx(len(whole.hashes) / 2**sample.bits, rel=0.3)
    found = [sample.share_of(HASHER.prompt(ids(text))) for text in TEXTS]
    assert {share for share in found if share is not None} == {1.0}


def test_passages_are_read_back(tmp_path: Path) -> None:
    stored = passages_of(TEXTS[:3]).join(Passages(np.array([7], np.uint64), 1))
    stored.write(tmp_path / "passages.npz")
    again = read_passages(tmp_path / "passages.npz")
    assert (again.bits, again.hashes.tolist()) == (stored.bits, stored.hashes.tolist())


class Stream(BatchSource):
    """The batches of a corpus as if they were read during training."""

    def __init__(self, corpus: TokenizedCorpus) -> None:
        self.batches = PackedBatches(corpus, 256, 2, seed=0)

    def batch(self, index: int) -> Batch:
        return self.batches.batch(index)


def test_a_corpus_is_recorded_whole_and_a_stream_as_it_is_read(tmp_path: Path) -> None:
    corpus = corpus_of(TEXTS[:8], tmp_path)
    known = RecordedBatches(PackedBatches(corpus, 256, 2, seed=0), HASHER, Passages.none())
    stream = RecordedBatches(Stream(corpus), HASHER, Passages.none())
    prompts = [ids(text) for text in TEXTS[:10]]
    assert count_seen(known.passages(), HASHER, prompts) == SeenPrompts(prompts=10, checked=10, seen=8)
    assert count_seen(stream.passages(), HASHER, prompts) == SeenPrompts(prompts=10, checked=10, seen=0)
    batches = [stream.batch(index) for index in range(4)]
    assert count_seen(stream.passages(), HASHER, prompts) == SeenPrompts(prompts=10, checked=10, seen=8)
    assert torch.equal(batches[3].tokens_BS, known.batch(3).tokens_BS)
    assert count_seen(None, HASHER, prompts) is None
