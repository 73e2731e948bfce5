"""Prompts that the backbone continues."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: token ids, at least one.
        domain: what kind of text it is; figures are given by domain.
        group: prompts of one conversation share it; uncertainty is over groups, which are independent of each other.
    """

    tokens: list[int]
    domain: str
    group: int
