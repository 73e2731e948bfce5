"""A document: the unit that is held out, tokenised and never mixed with another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum


class Split(Enum):
    """Which side of the hold-out a document lies on."""

    train = "train"
    heldout = "heldout"


@dataclass(frozen=True, slots=True)
class Document:
    """A named text."""

    name: str
    text: str


def split_of(name: str, heldout_every: int) -> Split:
    """The side that a document's name puts it on: one name in `heldout_every` is held out, on every machine alike."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return Split.heldout if digest % heldout_every == 0 else Split.train
