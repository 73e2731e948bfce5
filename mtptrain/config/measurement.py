"""Settings of speculative decoding and of the evaluation of heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtptrain.config.choices import DraftChoice, PastDepth, ServedAs, Show
from mtptrain.config.rules import MAX_DRAFT_LENGTH, check_fields, one_of, ranged, require
from mtptrain.kernels.choices import Verification

DIFFERENT_SIZES = "must be different numbers of prompts, each at least 1"


@dataclass(kw_only=True, slots=True)
class DecodingConfig:
    """Speculative decoding during an evaluation."""

    # Largest K to measure; every K from 1 up to it is reported.
    draft_length: int = ranged(4, at_least=1, at_most=MAX_DRAFT_LENGTH)
    # Tokens a prompt.
    max_new_tokens: int = ranged(64, at_least=2, rule="must be at least 2: the prompt's pass gives the first")
    # Tokens, by text or id, that end a text in addition to the end-of-text token.
    stop: list[Any] = field(default_factory=list)
    # Texts of any number of tokens: a text ends with the token that completes the first of them.
    stop_strings: list[str] = field(default_factory=list)
    # 0 = greedy; above it, more settings of sampling are read.
    temperature: float = ranged(0.0, at_least=0, rule="must be 0 (greedy) or above")
    # Number of most likely tokens that may be sampled; null = all.
    top_k: int | None = ranged(None, at_least=1, rule="must be at least 1, or null to keep all tokens")
    # Smallest probability mass of the most likely tokens that may be sampled.
    top_p: float = ranged(1.0, above=0, at_most=1, rule="must lie in (0, 1]; 1 keeps all tokens")
    # Excludes tokens whose probability is below this share of the likeliest one's; 0 = none. Needs a temperature.
    min_p: float = ranged(0.0, at_least=0, at_most=1, rule="must lie in [0, 1]; 0 excludes no token")
    # Divides the positive logits of tokens of prompt and text, and multiplies the negative ones; 1 = none.
    repetition_penalty: float = ranged(1.0, above=0, rule="must be above 0; 1 changes nothing")
    # Subtracted from a token's logit for each time that it occurs in the text so far; 0 = none.
    frequency_penalty: float = ranged(0.0, at_least=-2, at_most=2, rule="must lie in [-2, 2]; 0 changes nothing")
    # Subtracted from a token's logit if it occurs in the text so far; 0 = none.
    presence_penalty: float = ranged(0.0, at_least=-2, at_most=2, rule="must lie in [-2, 2]; 0 changes nothing")
    # At a temperature above 0: a sample from the head, or its most likely token.
    draft: DraftChoice = DraftChoice.sampled
    verification: Verification = Verification.token  # of sampled drafts: token by token as in servers, or by block
    # A draft ends before the first step at which the head's largest probability is below this value.
    min_confidence: float = ranged(0.0, at_least=0, at_most=1, rule="must lie in [0, 1]; 0 = never stop")

    # Of stacked modules: module of the draft steps beyond their depth.
    past_depth: PastDepth = PastDepth.repeat_last
    # Numerics of the modules: as trained, or as a server computes.
    served_as: ServedAs = ServedAs.exact

    def __post_init__(self) -> None:
        check_fields(self, "decoding")
        self._check_past_depth()
        is_known = all(isinstance(one, str | int) and not isinstance(one, bool) for one in self.stop)
        has_texts = all(isinstance(one, str) and one for one in self.stop_strings)
        require(has_texts, "decoding.stop_strings", self.stop_strings, "must be a list of texts that are not empty")
        require(is_known and "" not in self.stop, "decoding.stop", self.stop, "must be a list of token texts or ids")

    def _check_past_depth(self) -> None:
        """Refuse `wrap_around` with drafts that no replay covers."""
        if self.past_depth is not PastDepth.wrap_around:
            return
        require(
            self.temperature == 0 or self.draft is DraftChoice.greedy,
            "decoding.past_depth",
            self.past_depth.value,
            "overwrites keys, so a sampled draft depends on all passes before it and replay cannot sum over them; set "
            "decoding.draft=greedy, as vLLM drafts by default, or past_depth=stop, which drafts as vLLM does at "
            "K = number of modules",
        )
        require(
            self.min_confidence == 0,
            "decoding.min_confidence",
            self.min_confidence,
            "is no setting of a server that wraps around; set decoding.past_depth=repeat_last or stop",
        )


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Size of an evaluation."""

    num_prompts: int = ranged(64, at_least=1)  # or conversations, evenly spread over `prompts`; files may hold fewer
    prompt_tokens: int = ranged(96, at_least=1)  # tokens of a prompt sliced from held-out documents
    traces: str | None = None  # traces.jsonl of an earlier evaluation, reused instead of decoding prompts
    # Prompts that every head and K decode on the clock beside plain decoding, in at least 3 batches.
    timed_prompts: int = ranged(6, at_least=1)
    # Prompts decoded together when speed is measured.
    batch_sizes: list[int] = ranged([1], at_least=1, rule=DIFFERENT_SIZES)
    heldout_sequences: int = ranged(96, at_least=1)  # held-out sequences for the teacher-forced metrics
    every: int = ranged(0, at_least=0)  # training steps between replays of a few prompts; 0 = only at the end
    # Choice of the checkpoint `best`: acceptance length under the decoding policy, or expected at temperature 1, whose
    # error over so few prompts is smaller.
    best_by: str = one_of("expected", "expected", "policy")
    include_stock: bool = True  # measure the stock head beside the checkpoint
    # Checkpoints of a whole run that are also decoded, with certificate and speed; the others are only replayed.
    decoded: str = one_of("last", "last", "best", "all", "none")

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        sizes = self.batch_sizes
        require(0 < len(sizes) == len(set(sizes)), "evaluation.batch_sizes", sizes, DIFFERENT_SIZES)


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Measurement of a run's checkpoints while it trains elsewhere."""

    poll_seconds: float = ranged(30.0, above=0)  # between two looks at the run's folder
    minutes: float = ranged(1440.0, at_least=0)  # the watch ends after this time, also if the run is not finished

    def __post_init__(self) -> None:
        check_fields(self, "watch")


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Text on the screen while it is decoded."""

    plain: bool = False  # decode each prompt plainly as well, show both, and compare the texts
    raw: bool = False  # continue a prompt as it is, although the backbone has a chat template
    show: Show = Show.auto
    pace: float = ranged(0.05, at_least=0)  # seconds that a pass stays on a terminal at least; no figure counts them

    def __post_init__(self) -> None:
        check_fields(self, "generate")
