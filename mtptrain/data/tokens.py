"""Documents as one flat array of token ids with their boundaries, made once and cached by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer

from mtptrain.data.documents import Document
from mtptrain.errors import UserError
from mtptrain.storage import atomic_file

BATCH_DOCUMENTS = 256  # documents the tokenizer is given at once, fewer where they are long
BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """All documents of a split.

    Attributes:
        tokens: int32 [total], every document as BOS, its tokens, EOS, one after another.
        offsets: int64 [documents + 1], document d is tokens[offsets[d]:offsets[d + 1]].
        num_bytes: UTF-8 bytes of the text, for bits per byte.
        spoken: bool [total], which tokens may be targets; None where all may.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    spoken: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def cache_folder(configured: str | None) -> Path:
    """Where tokenised corpora are kept between runs."""
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mtptrain"


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, marks: tuple[list[int], list[int]]
) -> Iterable[np.ndarray]:
    """Token ids of each document in turn, with its marks, int32."""
    before, after = marks
    batch: list[str] = []

    def encode(texts: list[str]) -> Iterable[np.ndarray]:
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.asarray([*before, *encoding.ids, *after], dtype=np.int32)

    num_characters = 0
    for document in documents:
        batch.append(document.text)
        num_characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield from encode(batch)
            batch, num_characters = [], 0
    yield from encode(batch)


def _fingerprint(documents: Sequence[Document], tokenizer: Tokenizer, marks: tuple[list[int], list[int]]) -> str:
    digest = hashlib.sha256(tokenizer.to_str().encode())
    digest.update(repr(marks).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def tokenize_corpus(
    documents: Sequence[Document], tokenizer: Tokenizer, marks: tuple[list[int], list[int]], cache: Path
) -> TokenizedCorpus:
    """Tokenise documents, or read what an earlier run made of the same text, tokenizer and marks.

    Raises:
        UserError: the cache folder cannot be written.
    """
    path = cache / f"tokens-{_fingerprint(documents, tokenizer, marks)}.npz"
    if path.is_file():
        try:
            return _read_cache(path)
        except (ValueError, KeyError, BadZipFile):
            path.unlink()  # damaged: made anew below
    arrays = list(encode_documents(documents, tokenizer, marks))
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
    tokens = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    num_bytes = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents)
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, tokens=tokens, offsets=offsets, num_bytes=np.int64(num_bytes))
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache}: cannot be written ({error.strerror}); set it to a folder with room"
        ) from None
    return TokenizedCorpus(tokens, offsets, num_bytes)


def _read_cache(path: Path) -> TokenizedCorpus:
    with np.load(path) as stored:
        return TokenizedCorpus(stored["tokens"], stored["offsets"], int(stored["num_bytes"]))
