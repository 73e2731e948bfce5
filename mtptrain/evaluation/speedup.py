"""Speed on the clock: speculative against plain decoding, paired by prompt and interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.draft import Drafter
from mtptrain.decoding.plain import decode_plain
from mtptrain.decoding.records import Decoded, Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.stack import MtpStack


def run_interleaved(
    model: DeepseekV4ForCausalLM,
    stacks: dict[str, MtpStack],
    traces: list[Trace],
    draft_lengths: list[int],
    limits: Limits,
    report: Callable[[int, str], None],
) -> tuple[list[list[Decoded]], dict[tuple[str, int], list[Decoded]]]:
    """Decode every prompt plainly before and after all speculative runs of it, at batch 1.

    Args:
        model: the backbone.
        stacks: heads by name.
        traces: their prompts are decoded.
        draft_lengths: every K to run.
        limits: where a text ends.
        report: told the prompts done and a word on the current one.

    Returns:
        Two plain runs of each prompt, and the speculative runs by (head, K), in the order of the prompts.
    """
    device = model.lm_head.weight.device
    plain: list[list[Decoded]] = []
    speculative: dict[tuple[str, int], list[Decoded]] = {(name, k): [] for name in stacks for k in draft_lengths}
    for number, trace in enumerate(traces):
        prompt = torch.tensor([trace.prompt.tokens], device=device)
        first = decode_plain(model, prompt, limits)[0]
        for (name, k), records in speculative.items():
            records.append(decode_speculative(model, Drafter(model, stacks[name]), prompt, k, limits))
        plain.append([first, decode_plain(model, prompt, limits)[0]])
        report(number + 1, f"plain {len(first.tokens) / first.seconds:.0f} tokens/s")
    return plain, speculative


def summarize_speed(plain: list[list[Decoded]], speculative: list[Decoded]) -> dict[str, Any]:
    """Ratio of tokens a second, speculative over plain, by prompt: median, quartiles and the values."""
    ratios = []
    for pair, record in zip(plain, speculative, strict=True):
        baseline = np.mean([run.seconds / len(run.tokens) for run in pair])
        ratios.append(float(baseline / (record.seconds / len(record.tokens))))
    lower, median, upper = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {"median": median, "quartiles": [lower, upper], "per_prompt": ratios}
