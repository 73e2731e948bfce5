"""A document: the unit that is held out, tokenised and never mixed with another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mtptrain.errors import UserError


class Split(Enum):
    """Which side of the hold-out a document lies on."""

    train = "train"
    heldout = "heldout"


@dataclass(frozen=True, slots=True)
class Document:
    """A named text, or a conversation.

    Attributes:
        name: decides which side of the hold-out it lies on.
        text: what it says; of a conversation, what its messages say.
        messages: of a conversation, in which only the assistant's tokens are targets; empty for a text.
    """

    name: str
    text: str
    messages: list[Message] = field(default_factory=list)


def split_of(name: str, heldout_every: int) -> Split:
    """The side that a document's name puts it on: one name in `heldout_every` is held out, on every machine alike."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return Split.heldout if digest % heldout_every == 0 else Split.train


Message = dict[str, str]  # `role` and `content`


def check_text(where: str, key: str, value: Any) -> str:
    """A row's text, which must be one and say something.

    Args:
        where: file and line, for the error.
        key: of the row.
        value: what the row has there.

    Raises:
        UserError: it is no text, or empty.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must hold text, not {type(value).__name__}; see docs/prompts.md")
    if not value.strip():
        raise UserError(f"{where}: `{key}` is empty; write a text or drop the line")
    return value


def check_messages(where: str, value: list[Any]) -> list[Message]:
    """The messages of a row, each with a role and a text; what else one has is left out.

    Raises:
        UserError: one is of another form.
    """
    messages = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise UserError(f"{where}: each of `messages` must have a role and a content; see docs/prompts.md")
        messages.append({"role": one["role"], "content": check_text(where, "messages", one.get("content"))})
    return messages
