"""Speculative against plain decoding on the clock: the same batches of prompts, both ways in one run."""

# K drafted tokens

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice

import numpy as np
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.traced import recording_processor_seconds, recording_seconds, repeated
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import DecodedBatch, Limits
from mtptrain.decoding.speculative import begin_decoding, decode_plain, decode_speculative
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.evaluation.median import median_interval, spread
from mtptrain.evaluation.result import Doubt, MachineLoad, Speedup, TimeShares
from mtptrain.mtp.stack import MtpStack
from mtptrain.traces.file import Trace

LEAST_BATCHES = 3  # of each size: fewer give no quartiles
SHORTEST = 1e-9  # seconds: a broken clock must not end a run


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of a stretch of work, seconds.

    Attributes:
        wall: on the clock.
        processor: of all threads of this process.
        load: the machine's load average of the last minute, at the end; None if the system has none.
    """

    wall: float
    processor: float
    load: float | None


@dataclass(frozen=True, slots=True)
class BatchRuns:
    """One batch of prompts, decoded plainly before and after all of its speculative runs.

    Attributes:
        traces: their prompts were decoded, a row each.
        plain: the two plain runs.
        speculative: by head and draft length.
        plain_spent, speculative_spent: time of each run.
        on_processor: the backbone runs on the CPU.
    """

    traces: list[Trace]
    plain: tuple[DecodedBatch, DecodedBatch]
    speculative: dict[tuple[str, int], DecodedBatch]
    plain_spent: tuple[Spent, Spent]
    speculative_spent: dict[tuple[str, int], Spent]
    on_processor: bool

    @property
    def spent(self) -> list[Spent]:
        """The time of all runs."""
        return [*self.plain_spent, *self.speculative_spent.values()]


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
    """Decode every batch plainly and with every head and K; on a GPU, begin the first batch every way untimed before.

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
    on_processor = _is_on_processor(model)
    with repeated(len(batches)):
        for number, traces in enumerate(batches):
            prompts = [trace.prompt.tokens for trace in traces]
            seeds = [row_seed(seed, number * len(traces) + row) for row in range(len(traces))]
            if number == 0 and not on_processor:
                _warm_up(model, stacks, prompts, [0, *draft_lengths], limits, policy, seeds)
            plainly = partial(decode_plain, model, prompts, limits, policy, seeds)
            first, first_spent = timed(plainly)
            runs, spent = {}, {}
            for name, stack in stacks.items():
                for k in draft_lengths:
                    speculate = partial(
                        decode_speculative,
                        model,
                        head_proposer(model, stack, policy, k),
                        prompts,
                        k,
                        limits,
                        policy,
                        seeds,
                    )
                    runs[name, k], spent[name, k] = timed(speculate)
            last, last_spent = timed(plainly)
            results.append(BatchRuns(traces, (first, last), runs, (first_spent, last_spent), spent, on_processor))
            report(number + 1, f"plain {tokens_per_second([first]):.0f} tokens/s at batch {len(traces)}")
    return results


def _is_on_processor(model: DeepseekV4ForCausalLM) -> bool:
    return model.lm_head.weight.device.type == "cpu"


def _warm_up(
    model: DeepseekV4ForCausalLM,
    stacks: dict[str, MtpStack],
    prompts: list[list[int]],
    draft_lengths: list[int],
    limits: Limits,
    policy: Policy,
    seeds: list[int],
) -> None:
    """Decode up to the first pass, every way: kernels compile and libraries choose functions in their first runs."""
    for stack in stacks.values():
        for k in draft_lengths:
            proposer = head_proposer(model, stack, policy, k) if k else None
            decoding = begin_decoding(model, proposer, prompts, k, limits, policy, seeds)
            for _ in islice(decoding.passes(), 2):  # the prompts, and one pass
                pass


def timed(work: Callable[[], DecodedBatch]) -> tuple[DecodedBatch, Spent]:
    """Return the result of some work and the time that it took."""
    # Later runs reuse the traces that are recorded, so their time does not count.
    wall, processor = time.perf_counter() - recording_seconds(), time.process_time() - recording_processor_seconds()
    result = work()
    wall = time.perf_counter() - recording_seconds() - wall
    processor = time.process_time() - recording_processor_seconds() - processor
    return result, Spent(wall, processor, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)


def tokens_per_second(runs: list[DecodedBatch]) -> float:
    """Return the emitted tokens over the wall time, the prefill included."""
    return sum(len(row.tokens) for run in runs for row in run.rows) / _seconds(runs)


def batch_length(runs: list[BatchRuns], head: str, draft_length: int) -> float:
    """Return the tokens a pass of a whole batch, over the tokens per plain step.

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


def _seconds(runs: list[DecodedBatch], without_prefill: bool = False) -> float:
    """Return the wall time of some runs."""
    return max(sum(run.seconds.total - without_prefill * run.seconds.prefill for run in runs), SHORTEST)


def summarize_speed(runs: list[BatchRuns], head: str, draft_length: int, doubts: list[Doubt] | None = None) -> Speedup:
    """Return the ratio of tokens a second, speculative over plain, by batch of prompts.

    Args:
        runs: all timed batches of one size.
        head: its name.
        draft_length: K.
        doubts: reasons why the ratio cannot be right (`plausibility.find_doubts`).
    """
    key = head, draft_length
    decoded = [run.speculative[key] for run in runs]
    pairs = [(speculative, list(run.plain)) for speculative, run in zip(decoded, runs, strict=True)]
    ratios = [tokens_per_second([speculative]) / tokens_per_second(plain) for speculative, plain in pairs]
    after = [_after_prefill([speculative]) / _after_prefill(plain) for speculative, plain in pairs]
    total = _seconds(decoded)
    shares = {
        phase.name: sum(getattr(batch.seconds, phase.name) for batch in decoded) / total for phase in fields(TimeShares)
    }
    ratio = spread(ratios)
    interval, confidence = median_interval(ratios)
    return Speedup(
        median=ratio.median,
        quartiles=ratio.quartiles,
        interval=interval,
        confidence=confidence,
        per_batch=ratios,
        after_prefill=spread(after),
        processor=spread([processor_ratio(run, key) for run in runs]) if runs_on_processor(runs) else None,
        shares=TimeShares(**shares),
        doubts=doubts or [],
    )


def runs_on_processor(runs: list[BatchRuns]) -> bool:
    """Return whether the CPU did the work, so that its time can stand beside the clock's."""
    return all(run.on_processor for run in runs)


def processor_ratio(run: BatchRuns, key: tuple[str, int]) -> float:
    """Return the ratio of tokens per second of processor time, speculative over plain."""

    def rate(batches: list[DecodedBatch], spent: list[Spent]) -> float:
        tokens = sum(len(row.tokens) for batch in batches for row in batch.rows)
        return tokens / max(sum(one.processor for one in spent), SHORTEST)

    return rate([run.speculative[key]], [run.speculative_spent[key]]) / rate([*run.plain], [*run.plain_spent])


def machine_load(runs: list[BatchRuns]) -> MachineLoad:
    """Return how much of the machine the timed runs had."""
    spent = [one for run in runs for one in run.spent]
    loads = [one.load for one in spent if one.load is not None]
    wall, processor = sum(one.wall for one in spent), sum(one.processor for one in spent)
    return MachineLoad(
        processor_share=processor / max(wall, SHORTEST) if runs_on_processor(runs) else None,
        load=max(loads) if loads else None,
        cores=os.cpu_count() or 1,
    )


def _after_prefill(runs: list[DecodedBatch]) -> float:
    """Return the tokens per second of the passes alone; each row's first token comes from the prefill."""
    tokens = sum(len(row.tokens) - 1 for run in runs for row in run.rows)
    return max(tokens, 1) / _seconds(runs, without_prefill=True)
