"""Traces: prompts and the backbone's own continuations, on which every head is measured."""

# B prompts, P prompt tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.data.prompts import Prompt
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.plain import decode_plain
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


def heldout_prompts(corpus: TokenizedCorpus, count: int, length: int) -> list[Prompt]:
    """Prompts of `length` tokens, spread evenly over a corpus; none crosses a document's end.

    Raises:
        UserError: the corpus holds fewer.
    """
    starts: list[int] = []
    for begin, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        starts.extend(range(begin, end - length + 1, length))
    if len(starts) < count:
        raise UserError(
            f"evaluation.num_prompts={count}: the held-out text has {len(starts)} prompts of "
            f"evaluation.prompt_tokens={length}; lower one of them"
        )
    chosen = np.linspace(0, len(starts) - 1, count).round().astype(int)
    tokens = (corpus.tokens[starts[i] : starts[i] + length].tolist() for i in chosen)
    return [Prompt(ids, "heldout", number) for number, ids in enumerate(tokens)]


def record_traces(
    model: DeepseekV4ForCausalLM, prompts: list[Prompt], max_new_tokens: int, stop_id: int | None
) -> list[Trace]:
    """Continue every prompt greedily with the backbone alone. All prompts have one length."""
    device = model.lm_head.weight.device
    traces = []
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        group = prompts[start : start + PROMPTS_A_BATCH]
        tokens_BP = torch.tensor([prompt.tokens for prompt in group], device=device)
        for prompt, record in zip(group, decode_plain(model, tokens_BP, max_new_tokens, stop_id), strict=True):
            traces.append(Trace(prompt, record.tokens, record.gaps, [1.0] * len(record.tokens)))
    return traces
