"""How heads are decoded with and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtptrain.config.choices import DraftChoice, VerificationChoice
from mtptrain.config.rules import MAX_DRAFT_LENGTH, check_policy, require


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How speculative decoding is run when it is measured."""

    draft_length: int = 4  # the longest K that is measured; every K from 1 up to it is reported
    max_new_tokens: int = 64  # tokens a prompt
    stop: list[Any] = field(default_factory=list)  # tokens, by text or id, that end a text beside the end mark
    temperature: float = 0.0  # of the sampled text; 0 = greedy
    top_k: int | None = None  # likeliest tokens that may be sampled; null = all
    top_p: float = 1.0  # in (0, 1], smallest mass of likeliest tokens that may be sampled
    draft: DraftChoice = DraftChoice.sampled  # at a temperature above 0: drawn from the head, or its likeliest
    verification: VerificationChoice = VerificationChoice.token
    stop_below: float = 0.0  # a draft ends before a step whose largest head probability is below this; 0 = never

    def __post_init__(self) -> None:
        length = self.draft_length
        require(1 <= length <= MAX_DRAFT_LENGTH, "decoding.draft_length", length, "must lie between 1 and 8")
        tokens = self.max_new_tokens
        require(tokens >= 2, "decoding.max_new_tokens", tokens, "must be at least 2: the prompt's pass gives the first")
        check_policy("decoding", self.temperature, self.top_k, self.top_p)
        is_known = all(isinstance(one, str | int) and not isinstance(one, bool) for one in self.stop)
        require(is_known and "" not in self.stop, "decoding.stop", self.stop, "must be a list of token texts or ids")
        require(0 <= self.stop_below <= 1, "decoding.stop_below", self.stop_below, "must lie in [0, 1]; 0 = never stop")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """How much is measured."""

    num_prompts: int = 64  # prompts or conversations, evenly spread over what `prompts` names; its files may hold fewer
    prompt_tokens: int = 96  # tokens of a prompt cut from held-out documents
    traces: str | None = None  # the traces.jsonl of an earlier evaluation, used again instead of decoding prompts
    timed_prompts: int = 6  # of them, really decoded by every head and K beside plain decoding, in at least 3 batches
    batch_sizes: list[int] = field(default_factory=lambda: [1])  # prompts decoded together when speed is measured
    heldout_sequences: int = 96  # held-out sequences for the teacher-forced figures
    every: int = 0  # training steps between replays of some of the prompts; 0 = only at the end
    include_stock: bool = True  # measure the stock head beside the checkpoint

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "timed_prompts", "heldout_sequences"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "must be at least 1")
        sizes = self.batch_sizes
        require(
            bool(sizes) and min(sizes) >= 1 and len(set(sizes)) == len(sizes),
            "evaluation.batch_sizes",
            sizes,
            "must be different numbers of prompts, each at least 1",
        )
        require(self.every >= 0, "evaluation.every", self.every, "must not be negative")
