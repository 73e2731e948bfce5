"""Speed on the clock: speculative against plain decoding, paired by batch and interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.draft import Drafter
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.plain import decode_plain
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.records import DecodedBatch, Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.evaluation.result import Speedup, Spread, TimeShares
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.stack import MtpStack

LEAST_BATCHES = 3  # of each size: fewer give no quartiles


@dataclass(frozen=True, slots=True)
class BatchRuns:
    """One batch of prompts, decoded plainly before and after all speculative runs of it.

    Attributes:
        traces: whose prompts were decoded, a row each.
        plain: the two plain runs.
        speculative: by head and draft length.
    """

    traces: list[Trace]
    plain: tuple[DecodedBatch, DecodedBatch]
    speculative: dict[tuple[str, int], DecodedBatch]


def cut_batches(traces: list[Trace], size: int, num_prompts: int) -> list[list[Trace]]:
    """Batches of `size` prompts, spread over the traces: `num_prompts` in all, and at least three batches.

    Prompts are used again where there are too few.
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
        batches: their prompts are decoded.
        draft_lengths: every K to run.
        limits: where a text ends.
        policy: of all runs.
        seed: of the run; a row's draws depend on its place among all prompts.
        report: told the batches done and a word on the current one.
    """
    found = []
    for number, traces in enumerate(batches):
        prompts = [trace.prompt.tokens for trace in traces]
        seeds = [row_seed(seed, number * len(traces) + row) for row in range(len(traces))]
        first = decode_plain(model, prompts, limits, policy, seeds)
        runs = {
            (name, k): decode_speculative(model, Drafter(model, stack), prompts, k, limits, policy, seeds)
            for name, stack in stacks.items()
            for k in draft_lengths
        }
        found.append(BatchRuns(traces, (first, decode_plain(model, prompts, limits, policy, seeds)), runs))
        report(number + 1, f"plain {tokens_per_second([first]):.0f} tokens/s at batch {len(traces)}")
    return found


def tokens_per_second(runs: list[DecodedBatch]) -> float:
    """Emitted tokens over wall time, the prefill included."""
    return sum(len(row.tokens) for run in runs for row in run.rows) / sum(run.seconds.total for run in runs)


def batch_length(runs: list[BatchRuns], head: str, draft_length: int) -> float:
    """Tokens a verify pass of a whole batch, over those of a plain step.

    A batch decodes until its last row ends, and what a row does not use is lost: with more rows this falls below the
    acceptance length of the rows. With one row it is the acceptance length.
    """
    speculative = plain = 0.0
    for run in runs:
        rows, plain_rows = run.speculative[head, draft_length].rows, run.plain[0].rows
        tokens, plain_tokens = (sum(len(row.tokens) - 1 for row in some) for some in (rows, plain_rows))
        speculative += max(len(row.passes) for row in rows) / max(tokens, 1)
        plain += max(len(row.tokens) - 1 for row in plain_rows) / max(plain_tokens, 1)
    return plain / speculative if speculative else 1.0


def summarize_speed(runs: list[BatchRuns], head: str, draft_length: int) -> Speedup:
    """Return the ratio of tokens a second, speculative over plain, by batch of prompts."""
    mine = [run.speculative[head, draft_length] for run in runs]
    pairs = list(zip(runs, mine, strict=True))
    ratios = [tokens_per_second([one]) / tokens_per_second(list(run.plain)) for run, one in pairs]
    after = [_after_prefill([one]) / _after_prefill(list(run.plain)) for run, one in pairs]
    total = sum(run.seconds.total for run in mine)
    shares = {one.name: sum(getattr(run.seconds, one.name) for run in mine) / total for one in fields(TimeShares)}
    ratio = spread(ratios)
    return Speedup(ratio.median, ratio.quartiles, ratios, spread(after), TimeShares(**shares))


def spread(values: list[float]) -> Spread:
    """Return median and quartiles."""
    lower, median, upper = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(median, (lower, upper))


def _after_prefill(runs: list[DecodedBatch]) -> float:
    """Tokens a second of the passes alone; each row's first token comes from the prefill."""
    tokens = sum(len(row.tokens) - 1 for run in runs for row in run.rows)
    return max(tokens, 1) / sum(run.seconds.total - run.seconds.prefill for run in runs)
