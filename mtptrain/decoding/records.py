"""What a decoding run is bounded by and leaves behind. Metrics are computed from the records alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtptrain.config.rules import require


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a text ends.

    Attributes:
        max_new_tokens: tokens a row, at least 1.
        stop: token ids that end a row; the token itself is emitted.
    """

    max_new_tokens: int
    stop: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "decoding.max_new_tokens", self.max_new_tokens, "must be at least 1")


@dataclass(frozen=True, slots=True)
class VerifyPass:
    """One verification of a draft.

    Attributes:
        drafted: drafted tokens that could still be emitted, at least 1.
        accepted: how many of them were, counted from the first.
        emitted: accepted tokens and, where there was room for it, the verifier's own.
    """

    drafted: int
    accepted: int
    emitted: int


@dataclass(slots=True)
class Decoded:
    """The continuation of one prompt.

    Attributes:
        tokens: emitted token ids; the first comes from the prefill and belongs to no pass.
        gaps: difference of the verifier's two largest logits at each token, to tell a numerical tie from an error.
        passes: verify passes in order; empty for plain decoding.
        seconds: wall time of the whole, the prefill included.
    """

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    passes: list[VerifyPass] = field(default_factory=list)
    seconds: float = 0.0
