"""Wall-clock speed: speculative against plain decoding by batch, and the latency of single steps.

`run_interleaved` decodes batches of prompts plainly and speculatively in one run, and `summarize_speed` gives the
speed-up. `measure_steps` times single verify passes and drafts, and `describe_times` gives the speed-up that they
predict.
"""

# B rows, L tokens of a pass, K drafted tokens

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import prefill
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import DecodedBatch, Limits
from mtptrain.decoding.speculative import allocate_cache, decode_plain, decode_speculative
from mtptrain.decoding.steps import Step, verify_step
from mtptrain.decoding.texts import Texts
from mtptrain.decoding.traced import repeated
from mtptrain.evaluation.result import Speedup, Spread, StepLatency, TimeShares
from mtptrain.mtp.stack import MtpStack
from mtptrain.planning.speedup import Prediction, predict_speedups
from mtptrain.traces.file import Trace

LEAST_BATCHES = 3  # of each size: fewer give no quartiles
WARM_UP = 2  # repetitions that are not counted
ADVANCE = 2  # anchors that a draft runs, about the tokens that a pass of a fair head emits


@dataclass(frozen=True, slots=True)
class BatchRuns:
    """One batch of prompts, decoded plainly before and after all of its speculative runs.

    Attributes:
        traces: their prompts were decoded, a row each.
        plain: the two plain runs.
        speculative: by head and draft length.
    """

    traces: list[Trace]
    plain: tuple[DecodedBatch, DecodedBatch]
    speculative: dict[tuple[str, int], DecodedBatch]


def cut_batches(traces: list[Trace], size: int, num_prompts: int) -> list[list[Trace]]:
    """Return batches of `size` prompts, spread over the traces: `num_prompts` in all, and at least three batches.

    Prompts are repeated if there are too few.
    """
    count = max(LEAST_BATCHES, num_prompts // size)
    chosen = np.linspace(0, len(traces), count * size, endpoint=False).astype(int)
    return [[traces[i] for i in chosen[start : start + size]] for start in range(0, count * size, size)]


def run_interleaved(
    model: DeepseekV4ForCausalLM,
    stacks: dict[str, MtpStack],
    batches: list[list[Trace]],
    draft_lengths: list[int],
    limits: Limits,
    policy: Policy,
    seed: int,
    report: Callable[[int, str], None],
) -> list[BatchRuns]:
    """Decode every batch plainly and with every head and K.

    Args:
        model: the backbone.
        stacks: heads by name.
        batches: traces whose prompts are decoded.
        draft_lengths: every K to run.
        limits: end of the texts.
        policy: of all runs.
        seed: of the run; a row's random draws depend on its position among all prompts.
        report: callback(batches_done, status).
    """
    results = []
    for number, traces in enumerate(batches):
        prompts = [trace.prompt.tokens for trace in traces]
        seeds = [row_seed(seed, number * len(traces) + row) for row in range(len(traces))]
        with repeated(len(batches)):
            first = decode_plain(model, prompts, limits, policy, seeds)
            runs = {
                (name, k): decode_speculative(model, MtpProposer(model, stack), prompts, k, limits, policy, seeds)
                for name, stack in stacks.items()
                for k in draft_lengths
            }
            last = decode_plain(model, prompts, limits, policy, seeds)
        results.append(BatchRuns(traces, (first, last), runs))
        report(number + 1, f"plain {tokens_per_second([first]):.0f} tokens/s at batch {len(traces)}")
    return results


def tokens_per_second(runs: list[DecodedBatch]) -> float:
    """Return the emitted tokens over the wall time, the prefill included."""
    return sum(len(row.tokens) for run in runs for row in run.rows) / sum(run.seconds.total for run in runs)


def batch_length(runs: list[BatchRuns], head: str, draft_length: int) -> float:
    """Return the tokens per verify pass of a whole batch, over the tokens per plain step.

    A batch decodes until its last row ends, and rows that have ended waste their share of a pass: with several rows
    this falls below the acceptance length of the rows. With one row it is the acceptance length.
    """
    speculative = plain = 0.0
    for run in runs:
        rows, plain_rows = run.speculative[head, draft_length].rows, run.plain[0].rows
        tokens, plain_tokens = (sum(len(row.tokens) - 1 for row in batch) for batch in (rows, plain_rows))
        speculative += max(len(row.passes) for row in rows) / max(tokens, 1)
        plain += max(len(row.tokens) - 1 for row in plain_rows) / max(plain_tokens, 1)
    return plain / speculative if speculative else 1.0


def summarize_speed(runs: list[BatchRuns], head: str, draft_length: int) -> Speedup:
    """Return the ratio of tokens a second, speculative over plain, by batch of prompts."""
    decoded = [run.speculative[head, draft_length] for run in runs]
    pairs = [(speculative, list(run.plain)) for speculative, run in zip(decoded, runs, strict=True)]
    ratios = [tokens_per_second([speculative]) / tokens_per_second(plain) for speculative, plain in pairs]
    after = [_after_prefill([speculative]) / _after_prefill(plain) for speculative, plain in pairs]
    total = sum(batch.seconds.total for batch in decoded)
    shares = {
        phase.name: sum(getattr(batch.seconds, phase.name) for batch in decoded) / total for phase in fields(TimeShares)
    }
    ratio = spread(ratios)
    return Speedup(ratio.median, ratio.quartiles, ratios, spread(after), TimeShares(**shares))


def spread(values: list[float]) -> Spread:
    """Return median and quartiles."""
    lower, median, upper = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(median, (lower, upper))


def _after_prefill(runs: list[DecodedBatch]) -> float:
    """Return the tokens per second of the passes alone; each row's first token comes from the prefill."""
    tokens = sum(len(row.tokens) - 1 for run in runs for row in run.rows)
    return max(tokens, 1) / sum(run.seconds.total - run.seconds.prefill for run in runs)


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

    The steps are those of decoding with K drafts, for each K on its own, so they share its traces.

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
    for _ in range(WARM_UP + repetitions):
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
        lengths: tokens per verify pass by K >= 1: the acceptance length, or a whole batch's `batch_length`.
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
