"""Tokenise documents into one flat array of token ids with document boundaries, cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer

from mtptrain.config import OnBadRow
from mtptrain.data.bad_rows import BadRows
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Document
from mtptrain.data.notes import note
from mtptrain.errors import UserError
from mtptrain.run.nodes import on_each_node
from mtptrain.run.progress import waiting
from mtptrain.run.storage import atomic_file, clear_leftovers, user_cache

DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, BadZipFile)  # raised by numpy for cut or altered files
BATCH_DOCUMENTS = 256  # documents per call of the tokenizer, fewer if they are long
BATCH_CHARACTERS = 4_000_000
KILLED_AFTER = 3600.0  # seconds without a write after which a file of the cache belongs to a killed run


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """All documents of a split.

    Attributes:
        tokens: int32 [total], the documents one after another, texts between their bos_eos ids.
        offsets: int64 [documents + 1], document d is tokens[offsets[d]:offsets[d + 1]].
        num_bytes: UTF-8 bytes of the encoded text, for bits per byte; bos_eos ids do not count.
        loss_mask: bool [total], True for tokens that may be targets; None = all may.
        file: of the cache that holds it; None if it is in no cache.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    loss_mask: np.ndarray | None = None
    file: Path | None = None

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of a document, int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def digest(self) -> str:
        """Return the SHA-256 of token ids, boundaries and loss mask in hexadecimal."""
        content = hashlib.sha256(self.tokens.tobytes() + self.offsets.tobytes())
        content.update(self.loss_mask.tobytes() if self.loss_mask is not None else b"")
        return content.hexdigest()


def cache_folder(configured: str | None) -> Path:
    """Return the folder of tokenised corpora: `configured`, else mtptrain in the user's cache."""
    return Path(configured) if configured else user_cache()


def _fingerprint(documents: Sequence[Document], encoder: Encoder) -> str:
    digest = hashlib.sha256(encoder.tokenizer.to_str().encode())
    digest.update(repr(encoder.bos_eos).encode())
    if encoder.chat is not None and any(document.messages for document in documents):
        digest.update(f"{encoder.chat.sha256} {encoder.chat.turns.value} {encoder.on_bad_row.value}".encode())
    for document in documents:
        content = json.dumps([document.messages, document.tools]) if document.messages else document.text
        digest.update(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


def tokenize_corpus(
    documents: Sequence[Document], encoder: Encoder, cache: Path, max_tokens: int | None = None
) -> TokenizedCorpus:
    """Tokenise documents, or read them from the cache.

    A cached file is used only for the same text, tokenizer, bos_eos and chat template.

    Args:
        documents: the documents.
        encoder: turns them into tokens.
        cache: folder of tokenised corpora.
        max_tokens: stop before the document that would make more; None = tokenise all.

    Raises:
        UserError: the cache folder cannot be written, a conversation cannot be rendered, or the first document has
            more than `max_tokens` tokens.
    """
    limited = "" if max_tokens is None else f"-{max_tokens}"
    path = cache / f"corpus-{_fingerprint(documents, encoder)}{limited}.npz"
    stored = read_corpus(path)
    if stored is not None:
        return stored
    bad_rows = BadRows(encoder.on_bad_row)
    encoded: list[EncodedDocument] = []
    with waiting(f"tokenising {len(documents):,} documents", lambda: len(encoded) / len(documents)):
        for document in _leading(encoder.encode(documents, bad_rows), max_tokens):
            encoded.append(document)
    corpus = join_documents(encoded)
    arrays: dict[str, Any] = {
        "note": np.asarray(_note(bad_rows)),
        "tokens": corpus.tokens,
        "offsets": corpus.offsets,
        "num_bytes": np.int64(corpus.num_bytes),
    }
    if corpus.loss_mask is not None:
        arrays["loss_mask"] = corpus.loss_mask
    clear_leftovers(cache, idle_seconds=KILLED_AFTER)
    try:
        path.unlink(missing_ok=True)  # damaged or empty
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache}: cannot be written ({error.strerror}); set it to a folder with room"
        ) from None
    return replace(corpus, file=path)


def share_corpus(make: Callable[[], TokenizedCorpus]) -> TokenizedCorpus:
    """Return the corpus of `make`: one process of a node calls it, the others read the cache that it leaves.

    With several processes, all of them call this function.
    """
    made: list[TokenizedCorpus] = []

    def first() -> Path | None:
        made.append(make())
        return made[0].file

    file = on_each_node(first)
    return made[0] if made else (read_corpus(file) if file else None) or make()


def _leading(documents: Iterator[EncodedDocument], max_tokens: int | None) -> Iterator[EncodedDocument]:
    """Yield documents up to a number of tokens in total."""
    num_tokens = 0
    for document in documents:
        size, num_tokens = len(document.tokens), num_tokens + len(document.tokens)
        if max_tokens is not None and num_tokens > max_tokens:
            if size == num_tokens:
                raise UserError(f"data.max_tokens={max_tokens}: the first document has {size}; set at least {size}")
            return
        yield document


def join_documents(documents: Sequence[EncodedDocument]) -> TokenizedCorpus:
    """Concatenate encoded documents; if any has a loss mask, documents without one count as targets throughout."""
    loss_mask = None
    if any(one.loss_mask is not None for one in documents):
        masks = [np.ones(len(one.tokens), bool) if one.loss_mask is None else one.loss_mask for one in documents]
        loss_mask = np.concatenate(masks)
    tokens = np.concatenate([np.empty(0, np.int32), *(one.tokens for one in documents)])
    offsets = np.cumsum([0, *(len(one.tokens) for one in documents)], dtype=np.int64)
    return TokenizedCorpus(tokens, offsets, sum(one.num_bytes for one in documents), loss_mask)


def read_corpus(path: Path) -> TokenizedCorpus | None:
    """Return a corpus of the cache and show its note; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            num_bytes, loss_mask = int(stored["num_bytes"]), stored.get("loss_mask")
            corpus = TokenizedCorpus(stored["tokens"], stored["offsets"], num_bytes, loss_mask, path)
            _show(str(stored["note"]))
    except DAMAGE:
        return None
    return corpus


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        tokens: int32 token ids.
        loss_mask: bool, True for tokens that may be targets; None = all may.
        num_bytes: UTF-8 bytes of the encoded text; bos_eos ids do not count.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encode documents with a backbone's tokenizer and chat template.

    Attributes:
        tokenizer: the backbone's.
        bos_eos: ids before and after a text.
        chat: renders conversations; None if there is no template.
        on_bad_row: treatment of conversations that the template rejects.
    """

    tokenizer: Tokenizer
    bos_eos: tuple[list[int], list[int]]
    chat: ChatTemplate | None = None
    on_bad_row: OnBadRow = OnBadRow.error

    def encode(self, documents: Iterable[Document], bad_rows: BadRows | None = None) -> Iterator[EncodedDocument]:
        """Yield the documents encoded, in order; with `Turns.each`, every answer of a conversation is a document.

        Args:
            documents: the documents.
            bad_rows: counts conversations that are left out because the template rejects them.

        Raises:
            UserError: a document is a conversation and there is no chat template, or it rejects the conversation.
        """
        bad_rows = bad_rows or BadRows(self.on_bad_row)
        before, after = self.bos_eos
        for batch in _batches(documents):
            texts = [document.text for document in batch if not document.messages]
            encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for document in batch:
                if document.messages:
                    yield from self._encode_conversation(document, bad_rows)
                else:
                    tokens = np.asarray([*before, *next(encodings).ids, *after], dtype=np.int32)
                    yield EncodedDocument(tokens, None, _num_bytes(document.text))

    def _encode_conversation(self, document: Document, bad_rows: BadRows) -> list[EncodedDocument]:
        if self.chat is None:
            raise UserError(
                f"data.path: {document.name} is a conversation and the backbone's tokenizer has no chat template; set "
                "data.chat_template to a jinja file or to builtin, or data.field_name to a column that holds text"
            )
        try:
            rows = self.chat.encode_rows(document.messages, document.tools)
        except UserError as error:
            file, _, number = document.name.rpartition(":")  # rows are counted from 1 in errors
            where = f"{file}, row {int(number) + 1}" if number.isdecimal() else document.name
            bad_rows.add(UserError(f"data.path: {where}: {error}"))
            return []
        return [
            EncodedDocument(np.asarray(row.tokens, np.int32), np.asarray(row.loss_mask, bool), _num_bytes(row.text))
            for row in rows
        ]


def _note(bad_rows: BadRows) -> str:
    """Show the conversations that the template rejects, and return the line for later runs that read the cache."""
    line = f"data.on_bad_row=skip: {bad_rows.summary()}" if bad_rows.count else ""
    _show(line)
    return line


def _show(line: str) -> None:
    if line:
        note(line)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in groups of bounded number and total length."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch
