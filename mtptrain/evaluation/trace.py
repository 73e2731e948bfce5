"""Traces: prompts and the backbone's own continuations, on which every head is measured."""

# B prompts, P prompt tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.plain import decode_plain
from mtptrain.errors import UserError

PROMPTS_A_BATCH = 16


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt and the text that the backbone continued it with.

    Attributes:
        prompt: token ids.
        tokens: emitted token ids, greedy.
        gaps: top-2 logit gap of the backbone at each of them.
    """

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


def heldout_prompts(corpus: TokenizedCorpus, count: int, length: int) -> list[list[int]]:
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
    return [corpus.tokens[starts[i] : starts[i] + length].tolist() for i in chosen]


def record_traces(
    model: DeepseekV4ForCausalLM, prompts: list[list[int]], max_new_tokens: int, stop_id: int | None
) -> list[Trace]:
    """Continue every prompt greedily with the backbone alone. All prompts have one length."""
    device = model.lm_head.weight.device
    traces = []
    for start in range(0, len(prompts), PROMPTS_A_BATCH):
        group = prompts[start : start + PROMPTS_A_BATCH]
        records = decode_plain(model, torch.tensor(group, device=device), max_new_tokens, stop_id)
        traces += [Trace(prompt, record.tokens, record.gaps) for prompt, record in zip(group, records, strict=True)]
    return traces
