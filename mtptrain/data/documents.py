"""A document: the unit that is held out, tokenised and never mixed with another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum

from mtptrain.data.messages import Message


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
