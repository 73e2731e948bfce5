"""Penalties and min-p: changes of logits, made alike for target and draft before any distribution is computed.

Verification and replay then see nothing but other logits. They stay exact because the context of a position is the same
for both: the tokens before it, drafted ones included. So the kernels need no change, and these definitions in PyTorch
are the only ones.
"""

# R rows, T slots of a row, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Temperatures below the largest logit: exp of minus this is 0 in float64. A finite value, unlike -inf, leaves the gap
# between two logits finite, which traces store.
EXCLUDED = 1e4


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties on tokens that have occurred.

    Attributes:
        repetition: above 0; divides positive logits of the tokens of prompt and output, and multiplies negative ones.
        frequency: subtracted from a token's logit once for every time that it occurs in the output.
        presence: subtracted once if it occurs there at all.

    Source: `apply_penalties` of vLLM (vllm/model_executor/layers/utils.py), which follows OpenAI's API; `repetition` is
    that of CTRL, arXiv:1909.05858, and of transformers' `RepetitionPenaltyLogitsProcessor`.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def are_on(self) -> bool:
        """Whether any of them changes a logit."""
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)


class Context(NamedTuple):
    """Occurrences of every token before a position, float32 [R, V]: in prompt and output, and in the output alone."""

    text_RV: Tensor
    output_RV: Tensor

    def after(self, token_R: Tensor) -> Context:
        """Return the context one token later."""
        one_RV = torch.zeros_like(self.output_RV).scatter_(1, token_R.unsqueeze(1), 1.0)
        return Context(self.text_RV + one_RV, self.output_RV + one_RV)


def count_context(tokens_RT: Tensor, prompt_R: Tensor, length_R: Tensor, vocab_size: int) -> Context:
    """Return the context after the first `length_R` tokens of each row.

    Args:
        tokens_RT: int64 token ids; those from `length_R` on do not count.
        prompt_R: int64 tokens of the prompt.
        length_R: int64 tokens of prompt and output.
        vocab_size: V.
    """
    slot_T = torch.arange(tokens_RT.shape[1], device=tokens_RT.device)
    known_RT = slot_T < length_R.unsqueeze(1)
    emitted_RT = known_RT & (slot_T >= prompt_R.unsqueeze(1))
    zeros_RV = torch.zeros(len(tokens_RT), vocab_size, device=tokens_RT.device)
    text_RV, output_RV = (zeros_RV.scatter_add(1, tokens_RT, mask_RT.float()) for mask_RT in (known_RT, emitted_RT))
    return Context(text_RV, output_RV)


def penalise(logits_RV: Tensor, penalties: Penalties, context: Context) -> Tensor:
    """Return the logits with penalties for the tokens of their context, float32 or wider."""
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    factor_RV = torch.where(context.text_RV > 0, penalties.repetition, 1.0)
    logits_RV = torch.where(logits_RV > 0, logits_RV / factor_RV, logits_RV * factor_RV)
    return logits_RV - penalties.frequency * context.output_RV - penalties.presence * (context.output_RV > 0)


def exclude_below(logits: Tensor, min_p: float, temperature: float) -> Tensor:
    """Return logits that exclude the tokens whose probability is below `min_p` times that of the likeliest.

    Args:
        logits: floating [..., V].
        min_p: in (0, 1].
        temperature: above 0; the probabilities are those at this temperature, before top-k and top-p, as in vLLM.

    Returns:
        float32 or wider.

    Source: arXiv:2407.01082; transformers' `MinPLogitsWarper`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = logits.amax(-1, keepdim=True)
    share = ((logits - top) / temperature).exp()
    return torch.where(share >= min_p, logits, top - EXCLUDED * temperature)
