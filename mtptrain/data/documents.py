"""Documents: the unit of the hold-out and of tokenisation; attention never crosses from one into another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum

from mtptrain.run.typed_json import JsonObject

Message = JsonObject  # `role`, `content` and further keys, as chat templates read them
Call = JsonObject  # of a function, in OpenAI's form
Tool = JsonObject  # a function's JSON schema in OpenAI's form


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
        tools: the functions that a conversation's assistant may call.
    """

    name: str
    text: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)


def split_of(name: str, heldout_every: int) -> Split:
    """Return the side of a document by its name; one name in `heldout_every` is held out, the same on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return Split.heldout if digest % heldout_every == 0 else Split.train
