"""How heads are decoded with and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtptrain.config.choices import DraftChoice
from mtptrain.config.rules import MAX_DRAFT_LENGTH, check_fields, ranged, require
from mtptrain.kernels.choices import Verification

DIFFERENT_SIZES = "must be different numbers of prompts, each at least 1"


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """How speculative decoding is run when it is measured."""

    # The longest K that is measured; every K from 1 up to it is reported.
    draft_length: int = ranged(4, at_least=1, at_most=MAX_DRAFT_LENGTH)
    # Tokens a prompt.
    max_new_tokens: int = ranged(64, at_least=2, rule="must be at least 2: the prompt's pass gives the first")
    stop: list[Any] = field(default_factory=list)  # tokens, by text or id, that end a text beside the end mark
    temperature: float = ranged(0.0, at_least=0, rule="must be 0 (greedy) or above")
    # Likeliest tokens that may be sampled; null = all.
    top_k: int | None = ranged(None, at_least=1, rule="must be at least 1, or null to keep all tokens")
    # Smallest mass of likeliest tokens that may be sampled.
    top_p: float = ranged(1.0, above=0, at_most=1, rule="must lie in (0, 1]; 1 keeps all tokens")
    draft: DraftChoice = DraftChoice.sampled  # at a temperature above 0: drawn from the head, or its likeliest
    verification: Verification = Verification.token  # of sampled drafts: token by token as servers do, or by block
    # A draft ends before a step whose largest head probability is below this.
    min_confidence: float = ranged(0.0, at_least=0, at_most=1, rule="must lie in [0, 1]; 0 = never stop")

    def __post_init__(self) -> None:
        check_fields(self, "decoding")
        is_known = all(isinstance(one, str | int) and not isinstance(one, bool) for one in self.stop)
        require(is_known and "" not in self.stop, "decoding.stop", self.stop, "must be a list of token texts or ids")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """How much is measured."""

    num_prompts: int = ranged(64, at_least=1)  # or conversations, evenly spread over `prompts`; files may hold fewer
    prompt_tokens: int = ranged(96, at_least=1)  # tokens of a prompt cut from held-out documents
    traces: str | None = None  # the traces.jsonl of an earlier evaluation, used again instead of decoding prompts
    # Prompts that every head and K really decode beside plain decoding, in at least 3 batches.
    timed_prompts: int = ranged(6, at_least=1)
    # Prompts decoded together when speed is measured.
    batch_sizes: list[int] = ranged([1], at_least=1, rule=DIFFERENT_SIZES)
    heldout_sequences: int = ranged(96, at_least=1)  # held-out sequences for the teacher-forced figures
    every: int = ranged(0, at_least=0)  # training steps between replays of some of the prompts; 0 = only at the end
    include_stock: bool = True  # measure the stock head beside the checkpoint

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        sizes = self.batch_sizes
        require(0 < len(sizes) == len(set(sizes)), "evaluation.batch_sizes", sizes, DIFFERENT_SIZES)
