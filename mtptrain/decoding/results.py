"""Limits, records and timings of a decoding run. All metrics are computed from these records alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from mtptrain.backbone.traced import recording_seconds
from mtptrain.config import require


@dataclass(frozen=True, slots=True)
class StopStrings:
    """Texts that end a row, of any number of tokens.

    Attributes:
        texts: one or more, none empty.
        tokenizer: the backbone's.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer

    def end(self, before: list[int], new: list[int]) -> int | None:
        """Return the number of `new` tokens up to the end of the row, or None if it does not end.

        The row ends with the first of its tokens after which the decoded output contains one of the texts; special
        tokens are decoded too, and the prompt does not count. So the end depends on the tokens alone, not on the passes
        that emit them.

        Args:
            before: tokens emitted earlier, whose text contains none of the texts.
            new: tokens of this pass.
        """
        if not self._is_in([*before, *new]):
            return None
        return next(end for end in range(1, len(new) + 1) if self._is_in([*before, *new[:end]]))

    def _is_in(self, tokens: list[int]) -> bool:
        output = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(text in output for text in self.texts)

    def cut(self, output: str) -> str:
        """Return an output up to the first of the texts, as servers answer it."""
        return output[: min((at for text in self.texts if (at := output.find(text)) >= 0), default=None)]


@dataclass(frozen=True, slots=True)
class Limits:
    """The end of a text.

    Attributes:
        max_new_tokens: tokens per row, at least 1.
        stop: token ids that end a row; the token itself is emitted.
        strings: texts that end a row with the token that completes one; None if there are none.
    """

    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    strings: StopStrings | None = None

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "decoding.max_new_tokens", self.max_new_tokens, "must be at least 1")


@dataclass(frozen=True, slots=True)
class VerifyPass:
    """One verification of a draft.

    Attributes:
        drafted: drafted tokens that could still be emitted; 0 if the head stopped before its first.
        accepted: length of the accepted prefix of the draft.
        emitted: accepted tokens and, if there was room for it, the verifier's own.
    """

    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens that one pass added to a text, and the draft's end, which it did not keep.

    Attributes:
        accepted: kept drafts.
        own: the verifier's own token; none if the text ended with a draft.
        rejected: the first rejected draft and those after it; empty where the end of the text cut the draft.
    """

    accepted: list[int]
    own: list[int]
    rejected: list[int]

    @property
    def emitted(self) -> list[int]:
        """The added tokens."""
        return self.accepted + self.own


def settle_passes(accepted: Sequence[int], drafted: Sequence[int], num_tokens: int) -> list[VerifyPass]:
    """Return the records of the passes that emitted a text of `num_tokens` tokens, the first from the prefill.

    Drafted tokens past the end of the text are not counted, in the loop and in replay alike.

    Args:
        accepted: accepted drafts of each pass, as if the text continued.
        drafted: drafted tokens of each pass.
        num_tokens: tokens of the whole text.
    """
    passes, room = [], num_tokens - 1
    for length, count in zip(drafted, accepted, strict=True):
        kept = min(count, room)
        passes.append(VerifyPass(drafted=min(length, room), accepted=kept, emitted=min(kept + 1, room)))
        room -= passes[-1].emitted
    return passes


@dataclass(slots=True)
class Decoded:
    """The continuation of one prompt.

    Attributes:
        tokens: emitted token ids; the first comes from the prefill and belongs to no pass.
        gaps: difference of the verifier's two largest logits at each token, to tell a numerical tie from an error.
        probabilities: the policy's probability of each token; 1 when greedy.
        passes: verify passes in order; empty for plain decoding.
        rejected: the first drafted token that each pass rejected, None if it accepted all. The rest of the draft was
            dropped with that token.
    """

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    passes: list[VerifyPass] = field(default_factory=list)
    rejected: list[int | None] = field(default_factory=list)


@dataclass(slots=True)
class Seconds:
    """Wall-clock seconds of a run by phase; the rest of the total is bookkeeping.

    Attributes:
        total: the whole run, without `record`.
        prefill: backbone and proposer over the prompts.
        draft: drafting.
        verify: the backbone's pass and its lm_head.
        sample: acceptance, the verifier's own token, and the transfer of both to the host.
        rewind: dropping rejected tokens from the cache.
        record: recording the run's steps in CUDA graphs or traces. It is not in the total, because a server records
            once for all texts.
    """

    total: float = 0.0
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    sample: float = 0.0
    rewind: float = 0.0
    record: float = 0.0


@dataclass(slots=True)
class DecodedBatch:
    """Continuations of prompts that were decoded together, in the order of the prompts."""

    rows: list[Decoded]
    seconds: Seconds


class Clock:
    """Measures the phases of a run; waits for the GPU before reading the time.

    Args:
        device: device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Seconds()
        self.started = self.last = self._now()
        self.recording = recording_seconds()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`, a field of `Seconds`; that of traces made in it to `record`."""
        now, recording = self._now(), recording_seconds()
        self.seconds.record += recording - self.recording
        spent = now - self.last - (recording - self.recording)
        setattr(self.seconds, phase, getattr(self.seconds, phase) + spent)
        self.last, self.recording = now, recording

    def pause(self) -> None:
        """Leave out the time since the last lap, which belongs to a reader of the passes."""
        now = self._now()
        self.started += now - self.last
        self.last = now

    def so_far(self) -> Seconds:
        """Set the total up to the last lap, and return the seconds."""
        self.seconds.total = self.last - self.started - self.seconds.record
        return self.seconds

    def stop(self) -> Seconds:
        """Set the total, which excludes recording, and return the seconds."""
        self.last = self._now()
        return self.so_far()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
