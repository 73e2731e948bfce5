"""Traces: prompts and the backbone's own continuations, on which every head is measured."""

# B prompts, P prompt tokens

from __future__ import annotations

from dataclasses import dataclass

from transformers import DeepseekV4ForCausalLM

from mtptrain.data.prompts import Prompt
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.plain import decode_plain
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.records import Limits

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
        prompts: of any lengths; prompts of like length are decoded together.
        limits: where a text ends.
        policy: what is drawn from the backbone's logits.
        seed: of the draws, which depend on it and on a prompt's place in the list alone.
    """
    traces: dict[int, Trace] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].tokens))
    for start in range(0, len(order), PROMPTS_A_BATCH):
        group = order[start : start + PROMPTS_A_BATCH]
        tokens = [prompts[number].tokens for number in group]
        run = decode_plain(model, tokens, limits, policy, [row_seed(seed, number) for number in group])
        for number, record in zip(group, run.rows, strict=True):
            traces[number] = Trace(prompts[number], record.tokens, record.gaps, record.probabilities)
    return [traces[number] for number in range(len(prompts))]
