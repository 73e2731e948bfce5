"""From documents to token ids, and which of them may be targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Document
from mtptrain.errors import UserError

BATCH_DOCUMENTS = 256  # documents the tokenizer is given at once, fewer where they are long
BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        tokens: int32.
        spoken: bool, which of them may be targets; None where all may.
        num_bytes: UTF-8 bytes of the text they stand for, marks around it left out.
    """

    tokens: np.ndarray
    spoken: np.ndarray | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """How a backbone reads documents.

    Attributes:
        tokenizer: of the backbone.
        marks: ids before and after a text.
        chat: renders conversations; None where the tokenizer has no template.
    """

    tokenizer: Tokenizer
    marks: tuple[list[int], list[int]]
    chat: ChatTemplate | None = None

    def encode(self, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
        """Each document in turn.

        Raises:
            UserError: one is a conversation and there is no chat template.
        """
        before, after = self.marks
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
        tokens, spoken = self.chat.encode_marked(document.messages)
        rendered = self.chat.render(document.messages, asks=False)
        return EncodedDocument(np.asarray(tokens, np.int32), np.asarray(spoken, bool), _num_bytes(rendered))


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
