"""What a decoding run is bounded by and leaves behind. Metrics are computed from the records alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mtptrain.config import require


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
        drafted: drafted tokens that could still be emitted; 0 where the head stopped before its first.
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
        probabilities: what the policy gave each token; 1 when greedy.
        passes: verify passes in order; empty for plain decoding.
        rejected: the drafted token that each pass did not keep, None where it kept all; what was drafted after it fell
            with it.
    """

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    passes: list[VerifyPass] = field(default_factory=list)
    rejected: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class Seconds:
    """Wall seconds of a run, in all and by what they were spent on; the rest of the total is bookkeeping.

    Attributes:
        record: making CUDA graphs of the run's steps. It is not in the total: a server records once for all texts.
    """

    total: float = 0.0
    prefill: float = 0.0  # backbone and proposer over the prompts
    draft: float = 0.0
    verify: float = 0.0  # the backbone's pass and its lm_head
    sample: float = 0.0  # acceptance, the verifier's own token, and their way to the host
    rewind: float = 0.0
    record: float = 0.0


@dataclass(slots=True)
class DecodedBatch:
    """The continuations of some prompts that were decoded together, in their order."""

    rows: list[Decoded]
    seconds: Seconds


def settle_passes(accepted: Sequence[int], drafted: Sequence[int], num_tokens: int) -> list[VerifyPass]:
    """Records of the passes that emitted a text of `num_tokens` tokens, the first of which came from the prefill.

    Drafted tokens past the end of the text are not counted, in the loop and in replay alike.

    Args:
        accepted: accepted drafts of each pass, as if the text went on.
        drafted: drafted tokens of each pass.
        num_tokens: tokens of the whole text.
    """
    passes, room = [], num_tokens - 1
    for length, count in zip(drafted, accepted, strict=True):
        kept = min(count, room)
        passes.append(VerifyPass(drafted=min(length, room), accepted=kept, emitted=min(kept + 1, room)))
        room -= passes[-1].emitted
    return passes


class Clock:
    """Adds the time since the last lap to one of the fields of `seconds`; waits for the GPU before it reads the time.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Seconds()
        self.started = self.last = self._now()

    def lap(self, phase: str) -> None:
        """Count what ran since the last lap as `phase`, a field of `Seconds`."""
        now = self._now()
        setattr(self.seconds, phase, getattr(self.seconds, phase) + now - self.last)
        self.last = now

    def skip(self) -> None:
        """Count what ran since the last lap towards the total only."""
        self.last = time.perf_counter()

    def stop(self) -> Seconds:
        """The account, with its total: all time but that of recording."""
        self.seconds.total = self._now() - self.started - self.seconds.record
        return self.seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
