"""Times of the steps that decoding is made of, measured one by one, and the speed-up that they predict.

Every repetition runs each step once, so that a slow moment of the machine falls on all of them; a prediction is made
from each repetition's own times, and its median and quartiles are reported.
"""

# B rows, S slots of a text, N residual streams, D model width, K drafted tokens

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import decode_step, prefill
from mtptrain.decoding.draft import Drafter
from mtptrain.decoding.plain import allocate_cache
from mtptrain.mtp.stack import MtpStack
from mtptrain.planning.speedup import Prediction, predict_speedups

WARM_UP = 2  # repetitions that are not counted
ADVANCE = 2  # slots by which a text grows between two drafts, about what a pass of a fair head emits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds by repetition.

    Attributes:
        batch: rows decoded together.
        context: tokens that each row held.
        step: by n, of one backbone pass over n new tokens of every row, with logits, choice of tokens and rewind.
        draft: by K, of drafting K tokens for every row.
    """

    batch: int
    context: int
    step: dict[int, list[float]]
    draft: dict[int, list[float]]

    def predictions(self, lengths: Mapping[int, float]) -> dict[int, list[Prediction]]:
        """By K, what the times of each repetition predict at the acceptance lengths `lengths` (by K)."""
        found: dict[int, list[Prediction]] = {k: [] for k in sorted(lengths)}
        for number in range(len(self.step[1])):
            step = {n: seconds[number] for n, seconds in self.step.items()}
            draft = {k: seconds[number] for k, seconds in self.draft.items()}
            for one in predict_speedups(step, draft, lengths):
                found[one.draft_length].append(one)
        return found


class VerifyStep:
    """A backbone pass over n new tokens of every row, taken back afterwards so that the next one starts alike.

    Args:
        model: the backbone.
        context_BS: int64 tokens that every row holds before a pass.
        most: largest n.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, context_BS: Tensor, most: int) -> None:
        batch, length = context_BS.shape
        self.model, self.new_BL = model, context_BS[:, -1:].expand(-1, most)
        self.cache = allocate_cache(model, batch, length + most, most)
        with torch.inference_mode():
            prefill(model, self.cache, context_BS)

    @torch.inference_mode()
    def __call__(self, num_tokens: int) -> list[list[int]]:
        """The tokens that the backbone chooses after each of the new ones."""
        _, hidden_BLD = decode_step(self.model, self.cache, self.new_BL[:, :num_tokens])
        chosen = self.model.lm_head(hidden_BLD).argmax(-1).tolist()
        self.cache.rewind(self.cache.length_B - num_tokens)
        return chosen


class DraftStep:
    """Drafts of K tokens along a text whose streams are known, `ADVANCE` slots further at every call.

    Args:
        model: the backbone.
        stack: the head.
        text: tokens, at least `context + ADVANCE * calls + 1`.
        context: slots that the head has seen before the first call.
    """

    @torch.inference_mode()
    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack, text: list[int], context: int) -> None:
        self.drafter, self.text, self.seen = Drafter(model, stack), text, context
        tokens_1S = torch.tensor([text], device=model.lm_head.weight.device)
        self.streams_1SND, _ = prefill(model, allocate_cache(model, 1, len(text), 1), tokens_1S)
        self.drafter.draft(text[: context + 1], self.streams_1SND[:, :context], 1)

    @torch.inference_mode()
    def __call__(self, draft_length: int) -> list[int]:
        """The drafted tokens."""
        start, self.seen = self.seen, self.seen + ADVANCE
        return self.drafter.draft(self.text[: self.seen + 1], self.streams_1SND[:, start : self.seen], draft_length)


def measure_steps(
    model: DeepseekV4ForCausalLM, stack: MtpStack, text: list[int], longest: int, repetitions: int
) -> StepTimes:
    """Time backbone passes of 1 to `longest` + 1 tokens and drafts of 1 to `longest`, at batch 1.

    Args:
        model: the backbone.
        stack: the head that drafts.
        text: tokens that the row holds when a step starts; drafts run along repetitions of it.
        longest: the longest K.
        repetitions: of every step, interleaved.
    """
    device = model.lm_head.weight.device
    rounds = WARM_UP + repetitions
    needed = len(text) + ADVANCE * longest * rounds + 1
    verify = VerifyStep(model, torch.tensor([text], device=device), longest + 1)
    draft = DraftStep(model, stack, (text * (needed // len(text) + 1))[:needed], len(text))
    step: dict[int, list[float]] = {n: [] for n in range(1, longest + 2)}
    drafted: dict[int, list[float]] = {k: [] for k in range(1, longest + 1)}
    for _ in range(rounds):
        for n, seconds in step.items():
            seconds.append(_seconds(partial(verify, n), device))
        for k, seconds in drafted.items():
            seconds.append(_seconds(partial(draft, k), device))
    return StepTimes(
        batch=1,
        context=len(text),
        step={n: seconds[WARM_UP:] for n, seconds in step.items()},
        draft={k: seconds[WARM_UP:] for k, seconds in drafted.items()},
    )


def describe_times(times: StepTimes, lengths: Mapping[int, float]) -> dict[str, Any]:
    """Medians and quartiles of the times and of the speed-ups they predict, for a JSON file.

    Args:
        times: as measured.
        lengths: by K >= 1, acceptance lengths, from replay for instance.
    """
    return {
        "batch": times.batch,
        "context": times.context,
        "repetitions": len(times.step[1]),
        "step_seconds": {str(n): _spread(seconds) for n, seconds in times.step.items()},
        "draft_seconds": {str(k): _spread(seconds) for k, seconds in times.draft.items()},
        "predicted_speedup": {
            str(k): _spread([one.speedup for one in found]) for k, found in times.predictions(lengths).items()
        },
    }


def _spread(values: list[float]) -> dict[str, Any]:
    lower, median, upper = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": median, "quartiles": [lower, upper]}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of `work`, everything it started on the GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
