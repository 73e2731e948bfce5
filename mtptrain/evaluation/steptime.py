"""The latency of single steps of decoding, and the speed-up that it predicts (`planning.speedup`)."""

# B rows, L tokens of a pass, K drafted tokens

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import prefill
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache
from mtptrain.decoding.steps import Step, verify_step
from mtptrain.decoding.texts import Texts
from mtptrain.evaluation.median import spread
from mtptrain.evaluation.result import StepLatency
from mtptrain.mtp.stack import MtpStack
from mtptrain.planning.speedup import Prediction, predict_speedups
from mtptrain.run.progress import counted

WARM_UP = 2  # repetitions that are not counted
ADVANCE = 2  # anchors that a draft runs, about the tokens that a pass of a fair head emits


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Latency of single steps in seconds, by repetition.

    Attributes:
        batch: rows decoded together.
        context: tokens that each row held.
        step: by n, one backbone pass over n new tokens of every row, with logits, choice of tokens and rewind.
        draft: by K, drafting K tokens for every row.
    """

    batch: int
    context: int
    step: dict[int, list[float]]
    draft: dict[int, list[float]]

    def predictions(self, lengths: Mapping[int, float]) -> dict[int, list[Prediction]]:
        """Return predictions by K, one for each repetition, at the acceptance lengths `lengths` (by K)."""
        predictions: dict[int, list[Prediction]] = {k: [] for k in sorted(lengths)}
        for number in range(len(self.step[1])):
            step = {n: seconds[number] for n, seconds in self.step.items()}
            draft = {k: seconds[number] for k, seconds in self.draft.items()}
            for prediction in predict_speedups(step, draft, lengths):
                predictions[prediction.draft_length].append(prediction)
        return predictions


class StepBench:
    """Texts of one length whose next pass and draft can be repeated from the same state.

    The steps are those of decoding with K drafts, for each K on its own, so they share its traces. Drafts past the
    depth repeat the last module, whatever `decoding.past_depth` says.

    Args:
        model: the backbone.
        stack: the head that drafts.
        prompts: token ids, all of one length.
        longest: the longest K.
        limits: end of the texts in the decoding that is timed.
    """

    @torch.inference_mode()
    def __init__(
        self, model: DeepseekV4ForCausalLM, stack: MtpStack, prompts: list[list[int]], longest: int, limits: Limits
    ) -> None:
        self.proposers = {k: MtpProposer(model, stack) for k in range(1, longest + 1)}
        self.passes: dict[int, Step] = {}
        self.caches: dict[int, BackboneCache] = {}
        for k in range(longest + 1):
            texts = Texts(prompts, limits, k, model.lm_head.weight.device)
            texts.newest = ADVANCE
            cache = allocate_cache(model, len(prompts), texts.max_length, k + 1)
            self.passes[k + 1], self.caches[k + 1] = verify_step(model, cache, texts.num_passes), cache
            if k > 0:
                self.proposers[k].start(texts, k, GREEDY)
            for part in prefill(model, cache, texts.tokens_BT, texts.lengths):
                if k > 0:
                    self.proposers[k].read(part)
            self.texts = texts

    @torch.inference_mode()
    def verify(self, num_tokens: int) -> list[list[int]]:
        """Run a backbone pass over n new tokens of every row, rewind, and return the tokens that it chose, [B, n]."""
        first = self.texts.lengths[0]
        _, logits_BLV = self.passes[num_tokens](self.texts.tokens_BT[:, first : first + num_tokens])
        chosen = logits_BLV.argmax(-1).tolist()
        self.caches[num_tokens].rewind(self.texts.prompt_B)
        return chosen

    @torch.inference_mode()
    def draft(self, draft_length: int) -> list[list[int]]:
        """Return drafts of K tokens after the texts, [B, K]."""
        return self.proposers[draft_length].draft(None).tokens_BK.tolist()


def measure_steps(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    prompts: list[list[int]],
    longest: int,
    limits: Limits,
    repetitions: int,
) -> StepTimes:
    """Time backbone passes of 1 to `longest` + 1 tokens and drafts of 1 to `longest`.

    Args:
        model: the backbone.
        stack: the head that drafts.
        prompts: token ids that the rows hold before a step; all of one length.
        longest: the longest K.
        limits: end of the texts in the decoding that is timed.
        repetitions: of every step, interleaved.
    """
    device = model.lm_head.weight.device
    bench = StepBench(model, stack, prompts, longest, limits)
    step: dict[int, list[float]] = {n: [] for n in range(1, longest + 2)}
    drafted: dict[int, list[float]] = {k: [] for k in range(1, longest + 1)}
    for _ in counted(f"timing single steps at batch {len(prompts)}", range(WARM_UP + repetitions)):
        for n, seconds in step.items():
            seconds.append(_seconds(partial(bench.verify, n), device))
        for k, seconds in drafted.items():
            seconds.append(_seconds(partial(bench.draft, k), device))
    return StepTimes(
        batch=len(prompts),
        context=len(prompts[0]),
        step={n: seconds[WARM_UP:] for n, seconds in step.items()},
        draft={k: seconds[WARM_UP:] for k, seconds in drafted.items()},
    )


def describe_times(times: StepTimes, lengths: Mapping[int, float]) -> StepLatency:
    """Return medians and quartiles of the times and of the speed-ups they predict.

    Args:
        times: as measured.
        lengths: tokens a pass by K >= 1: the acceptance length, or a whole batch's `batch_length`.
    """
    predictions = times.predictions(lengths)
    return StepLatency(
        batch=times.batch,
        context=times.context,
        repetitions=len(times.step[1]),
        step_seconds={n: spread(seconds) for n, seconds in times.step.items()},
        draft_seconds={k: spread(seconds) for k, seconds in times.draft.items()},
        predicted_speedup={k: spread([prediction.speedup for prediction in of_k]) for k, of_k in predictions.items()},
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall seconds of `work`, including its work on the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
