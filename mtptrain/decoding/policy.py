"""Decoding policies: the sampling distribution, and how drafts are made and verified."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mtptrain.config import DecodingConfig, DraftChoice, PastDepth
from mtptrain.decoding.penalties import Context, Penalties, exclude_below, penalise
from mtptrain.kernels.acceptance import Sampling, Verification, policy_probabilities

NO_PENALTIES = Penalties()


@dataclass(frozen=True, slots=True)
class Policy:
    """A decoding policy. The output has the backbone's own distribution under it.

    Penalties apply first, then temperature, min-p, top-k and top-p, as in vLLM.

    Attributes:
        temperature: 0 is greedy.
        top_k: likeliest tokens kept; None keeps all.
        top_p: in (0, 1]; keeps the fewest likeliest tokens whose mass reaches it.
        draft: how tokens are drafted: drawn from the head's own distribution under the same policy, or its likeliest.
            At temperature 0 both choices give the likeliest.
        verification: token by token, or by block.
        min_confidence: a draft ends before the first step whose largest head probability, at temperature 1, lies below
            this. The stop is decided before the step's token is drawn, so the output distribution is unaffected.
        min_p: in [0, 1]; excludes tokens whose probability is below this share of the likeliest one's.
        penalties: on tokens that have occurred.
        past_depth: drafts of stacked modules beyond their depth.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    draft: DraftChoice = DraftChoice.sampled
    verification: Verification = Verification.token
    min_confidence: float = 0.0
    min_p: float = 0.0
    penalties: Penalties = NO_PENALTIES
    past_depth: PastDepth = PastDepth.repeat_last

    @property
    def is_greedy(self) -> bool:
        """Whether every emitted token is the backbone's likeliest."""
        return self.temperature == 0

    @property
    def draws_greedily(self) -> bool:
        """Whether drafted tokens are the head's likeliest."""
        return self.is_greedy or self.draft is DraftChoice.greedy

    @property
    def with_other_drafts(self) -> Policy | None:
        """The same policy with greedy instead of sampled drafts, or the reverse.

        None at temperature 0, and with `wrap_around`, where replay knows greedy drafts only.
        """
        if self.is_greedy or self.past_depth is PastDepth.wrap_around:
            return None
        other = DraftChoice.greedy if self.draft is DraftChoice.sampled else DraftChoice.sampled
        return replace(self, draft=other)

    def drafted_steps(self, depth: int, draft_length: int) -> int:
        """Return the most tokens of a draft by a head of `depth` modules."""
        stops = self.past_depth is PastDepth.stop and depth > 1
        return min(depth, draft_length) if stops else draft_length

    def trained_steps(self, depth: int, draft_length: int) -> int:
        """Return the draft steps that run as in the rollout of training, which repeats the last module."""
        repeats = self.past_depth is PastDepth.repeat_last or depth == 1
        return draft_length if repeats else min(depth, draft_length)

    def wraps(self, depth: int, draft_length: int) -> bool:
        """Return whether a draft starts again with the first of `depth` modules."""
        return self.past_depth is PastDepth.wrap_around and 1 < depth < draft_length

    @property
    def sampling(self) -> Sampling:
        """Temperature, top-k and top-p, for the kernels."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def adjust(self, logits: Tensor, context: Context | None) -> Tensor:
        """Return logits of target or draft [..., V] after penalties and min-p; unchanged if the policy has neither.

        Args:
            logits: floating; [R, V] with a context.
            context: the tokens before; read only with penalties, which need it.
        """
        if self.penalties.are_on:
            assert context is not None, "penalties need the tokens before"
            logits = penalise(logits, self.penalties, context)
        return logits if self.min_p == 0 or self.is_greedy else exclude_below(logits, self.min_p, self.temperature)

    def target(self, logits: Tensor, context: Context | None = None) -> Tensor:
        """Return the output distribution, from the backbone's logits [..., V]; float32, one-hot when greedy."""
        return policy_probabilities(self.adjust(logits, context), self.sampling)

    def proposal(self, logits: Tensor, context: Context | None = None) -> Tensor:
        """Return the draft distribution, from the head's logits [..., V]; float32, one-hot for greedy drafts."""
        if self.draws_greedily:
            return policy_probabilities(self.adjust(logits, context), Sampling(0.0))
        return self.target(logits, context)


GREEDY = Policy()


def decoding_policy(config: DecodingConfig) -> Policy:
    """Return the policy of a run's settings."""
    return Policy(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        draft=config.draft,
        verification=config.verification,
        min_confidence=config.min_confidence,
        min_p=config.min_p,
        penalties=Penalties(config.repetition_penalty, config.frequency_penalty, config.presence_penalty),
        past_depth=config.past_depth,
    )
