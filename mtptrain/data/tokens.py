"""Documents as one flat array of token ids with their boundaries, made once and cached by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer

from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Document
from mtptrain.errors import UserError
from mtptrain.run.storage import atomic_file


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """All documents of a split.

    Attributes:
        tokens: int32 [total], every document one after another, texts with their bos_eos.
        offsets: int64 [documents + 1], document d is tokens[offsets[d]:offsets[d + 1]].
        num_bytes: UTF-8 bytes of the text that they stand for, for bits per byte.
        loss_mask: bool [total], which tokens may be targets; None where all may.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    loss_mask: np.ndarray | None = None

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


def _fingerprint(documents: Sequence[Document], encoder: Encoder) -> str:
    digest = hashlib.sha256(encoder.tokenizer.to_str().encode())
    digest.update(repr(encoder.bos_eos).encode())
    if encoder.chat is not None and any(document.messages for document in documents):
        digest.update(encoder.chat.sha256.encode())
    for document in documents:
        content = json.dumps(document.messages) if document.messages else document.text
        digest.update(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def tokenize_corpus(documents: Sequence[Document], encoder: Encoder, cache: Path) -> TokenizedCorpus:
    """Tokenise documents, or read what an earlier run made of the same text, tokenizer, bos_eos and template.

    Raises:
        UserError: the cache folder cannot be written, or a conversation cannot be rendered.
    """
    path = cache / f"corpus-{_fingerprint(documents, encoder)}.npz"
    if path.is_file():
        try:
            return _read_cache(path)
        except (ValueError, KeyError, BadZipFile):
            path.unlink()  # damaged: made anew below
    corpus = join_documents(list(encoder.encode(documents)))
    arrays: dict[str, Any] = {
        "tokens": corpus.tokens,
        "offsets": corpus.offsets,
        "num_bytes": np.int64(corpus.num_bytes),
    }
    if corpus.loss_mask is not None:
        arrays["loss_mask"] = corpus.loss_mask
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache}: cannot be written ({error.strerror}); set it to a folder with room"
        ) from None
    return corpus


def join_documents(documents: Sequence[EncodedDocument]) -> TokenizedCorpus:
    """Encoded documents one after another; where one has tokens that may not be targets, all of the others' may."""
    loss_mask = None
    if any(one.loss_mask is not None for one in documents):
        masks = [np.ones(len(one.tokens), bool) if one.loss_mask is None else one.loss_mask for one in documents]
        loss_mask = np.concatenate(masks)
    tokens = np.concatenate([np.empty(0, np.int32), *(one.tokens for one in documents)])
    offsets = np.cumsum([0, *(len(one.tokens) for one in documents)], dtype=np.int64)
    return TokenizedCorpus(tokens, offsets, sum(one.num_bytes for one in documents), loss_mask)


def _read_cache(path: Path) -> TokenizedCorpus:
    with np.load(path) as stored:
        return TokenizedCorpus(stored["tokens"], stored["offsets"], int(stored["num_bytes"]), stored.get("loss_mask"))


BATCH_DOCUMENTS = 256  # documents the tokenizer is given at once, fewer where they are long
BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        tokens: int32.
        loss_mask: bool, which of them may be targets; None where all may.
        num_bytes: UTF-8 bytes of the text they stand for, bos_eos around it left out.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """How a backbone reads documents.

    Attributes:
        tokenizer: of the backbone.
        bos_eos: ids before and after a text.
        chat: renders conversations; None where the tokenizer has no template.
    """

    tokenizer: Tokenizer
    bos_eos: tuple[list[int], list[int]]
    chat: ChatTemplate | None = None

    def encode(self, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
        """Each document in turn.

        Raises:
            UserError: one is a conversation and there is no chat template.
        """
        before, after = self.bos_eos
        for batch in _batches(documents):
            texts = [document.text for document in batch if not document.messages]
            encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for document in batch:
                if document.messages:
                    yield self._encode_conversation(document)
                else:
                    tokens = np.asarray([*before, *next(encodings).ids, *after], dtype=np.int32)
                    yield EncodedDocument(tokens, None, _num_bytes(document.text))

    def _encode_conversation(self, document: Document) -> EncodedDocument:
        if self.chat is None:
            raise UserError(
                f"data.path: {document.name} is a conversation and the backbone's tokenizer has no chat template; set "
                "data.chat_template to a jinja file, or data.field_name to a column that holds text"
            )
        tokens, loss_mask = self.chat.encode_with_mask(document.messages)
        rendered = self.chat.render(document.messages, asks=False)
        return EncodedDocument(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool), _num_bytes(rendered))


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that are bounded in number and in length."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch
