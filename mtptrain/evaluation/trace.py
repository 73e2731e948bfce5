"""Traces: prompts and the backbone's own continuations, on which every head is measured."""

# B prompts, P prompt tokens

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.data.prompts import Prompt
from mtptrain.decoding.plain import decode_plain
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.records import Limits
from mtptrain.errors import UserError

PROMPTS_A_BATCH = 16


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt and the text that the backbone continued it with.

    Attributes:
        prompt: what was continued.
        tokens: emitted token ids.
        gaps: top-2 logit gap of the backbone at each of them.
        probabilities: what the decoding policy gave each of them; 1 in a greedy text.
    """

    prompt: Prompt
    tokens: list[int]
    gaps: list[float]
    probabilities: list[float]


def record_traces(
    model: DeepseekV4ForCausalLM, prompts: list[Prompt], limits: Limits, policy: Policy, seed: int
) -> list[Trace]:
    """Continue every prompt with the backbone alone; traces come in the order of the prompts.

    Args:
        model: the backbone.
        prompts: of any lengths; those of one length are decoded together.
        limits: where a text ends.
        policy: what is drawn from the backbone's logits.
        seed: of the draws.

    Raises:
        UserError: the policy is not greedy; sampled texts are not decoded yet.
    """
    if not policy.is_greedy:
        raise UserError(f"decoding.temperature={policy.temperature}: only greedy texts are decoded so far; set it to 0")
    device = model.lm_head.weight.device
    traces: dict[int, Trace] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens))
    while order:
        length = len(prompts[order[0]].tokens)
        group = [number for number in order[:PROMPTS_A_BATCH] if len(prompts[number].tokens) == length]
        order = order[len(group) :]
        tokens_BP = torch.tensor([prompts[number].tokens for number in group], device=device)
        for number, record in zip(group, decode_plain(model, tokens_BP, limits), strict=True):
            traces[number] = Trace(prompts[number], record.tokens, record.gaps, [1.0] * len(record.tokens))
    return [traces[number] for number in range(len(prompts))]
