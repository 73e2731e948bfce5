"""Documents: the unit of the hold-out and of tokenisation; attention never crosses from one into another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mtptrain.errors import UserError


class Split(Enum):
    """The two sides of the hold-out."""

    train = "train"
    heldout = "heldout"


@dataclass(frozen=True, slots=True)
class Document:
    """A named text, or a conversation.

    Attributes:
        name: decides the side of the hold-out.
        text: the text; for a conversation, the contents of its messages, one per line.
        messages: of a conversation, where only the assistant's tokens are targets; empty for a text.
    """

    name: str
    text: str
    messages: list[Message] = field(default_factory=list)


def split_of(name: str, heldout_every: int) -> Split:
    """Return the side of a document by its name; one name in `heldout_every` is held out, the same on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return Split.heldout if digest % heldout_every == 0 else Split.train


Message = dict[str, str]  # `role` and `content`


def check_text(where: str, key: str, value: Any) -> str:
    """Return `value`, the text of a row, unless it is empty or no text.

    Args:
        where: file and line, for the error.
        key: key of the value in its row, for the error.
        value: the value.

    Raises:
        UserError: the value is no text, or blank.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must hold text, not {type(value).__name__}; see docs/prompts.md")
    if not value.strip():
        raise UserError(f"{where}: `{key}` is empty; write a text or drop the line")
    return value


def check_messages(where: str, value: list[Any]) -> list[Message]:
    """Return the messages of a row, each with its role and content only.

    Raises:
        UserError: a message lacks a role or a content, or its content is blank.
    """
    messages = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise UserError(f"{where}: each of `messages` must have a role and a content; see docs/prompts.md")
        messages.append({"role": one["role"], "content": check_text(where, "messages", one.get("content"))})
    return messages
