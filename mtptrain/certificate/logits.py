"""The logits of decoding, held against transformers' own forward, and those of drafts against the rollout.

Equal tokens do not prove equal logits: a cache with a stale entry moves every logit a little and few tokens. So gaps of
the two largest logits and log-probabilities of the emitted tokens are compared, text by text, with the rounding noise
that this very run has (`rounding`). A text lies beyond the noise if its differences are typically larger than the
bound; how many texts may do so by chance follows from the disturbed texts that did.
"""

# B rows, N emitted tokens, K drafted tokens, V vocabulary

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import DeepseekV4ForCausalLM

from mtptrain.certificate.differences import Differences, both_quantities, judge
from mtptrain.certificate.drafts import against_rollout
from mtptrain.certificate.greedy import LoopRun, count_agreeing
from mtptrain.certificate.passes import DraftNoise
from mtptrain.certificate.rounding import Logits, measure_noise, upstream_logits
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded, Limits
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.evaluation.certificate_result import (
    LogitsTest,
    Outcome,
    Quantity,
    RoundingNoise,
)
from mtptrain.mtp.stack import MtpStack
from mtptrain.run.progress import counted
from mtptrain.traces.file import Trace

LEVEL = 1e-4  # false alarms of all comparisons together
PROMPTS, CONTEXT, NEW_TOKENS = 4, 512, 32  # of the texts that are held against transformers' forward
SAMPLED = Policy(temperature=1.0)  # its recorded probabilities are those of the logits themselves
UPSTREAM, PLAIN = "transformers' forward", "plain decoding"


def _recorded(row: Decoded) -> Logits:
    """Return the logits that decoding recorded at temperature 1."""
    return Logits(np.array(row.gaps, dtype=np.float64), np.log(np.array(row.probabilities, dtype=np.float64)))


def distinct_prompts(traces: list[Trace], length: int) -> list[list[int]]:
    """Return the first `PROMPTS` different prompts, all cut to their first `length` tokens or all to their last.

    Prompts may begin alike, with a system prompt, or end alike, with an instruction: the cut that leaves more of
    them different is taken.
    """
    prompts = [trace.prompt.tokens for trace in traces]
    cuts = [dict.fromkeys(tuple(prompt[part]) for prompt in prompts) for part in (slice(length), slice(-length, None))]
    return [list(prompt) for prompt in max(cuts, key=len)][:PROMPTS]


def against_upstream(
    model: DeepseekV4ForCausalLM, stacks: dict[str, MtpStack], prompts: list[list[int]], limits: Limits, length: int
) -> tuple[list[Differences], RoundingNoise]:
    """Decode prompts at temperature 1, plainly and with each head at K = `length`; compare with transformers' forward.

    Returns:
        The differences of every run, and the rounding noise of the backbone.
    """
    limits = replace(limits, max_new_tokens=min(limits.max_new_tokens, NEW_TOKENS))
    seeds = [row_seed(0, number) for number in range(len(prompts))]
    runs = {PLAIN: decode_plain(model, prompts, limits, SAMPLED, seeds).rows}
    for name, stack in counted("certificate: decoding with every head", list(stacks.items())):
        proposer = MtpProposer(model, stack)
        runs[f"{name} head, K={length}"] = decode_speculative(
            model, proposer, prompts, length, limits, SAMPLED, seeds
        ).rows
    texts = {name: [row.tokens for row in rows] for name, rows in runs.items()}
    dtype = model.lm_head.weight.dtype
    noise = measure_noise(lambda: upstream_logits(model, prompts, texts[PLAIN]), [model.model], dtype)
    differences: list[Differences] = []
    for name, rows in counted(f"certificate: comparing with {UPSTREAM}", list(runs.items())):
        upstream = upstream_logits(model, prompts, texts[name])
        pairs = [(_recorded(row), one) for row, one in zip(rows, upstream, strict=True)]
        differences += both_quantities(name, UPSTREAM, pairs, noise)
    return differences, noise


def against_plain(runs: list[LoopRun], noise: RoundingNoise) -> list[Differences]:
    """Compare the gaps of greedy loops with those of plain decoding, up to the token where their texts part."""
    groups: dict[tuple[str, int, int], dict[int, np.ndarray]] = {}
    for run in runs:
        count = count_agreeing(run)
        difference_N = np.array(run.loop.gaps[:count]) - np.array(run.plain.gaps[:count])
        groups.setdefault((run.head, run.draft_length, run.batch), {})[run.prompt] = difference_N
    return [
        Differences(
            f"{head} head, K={length}, batch {batch}",
            PLAIN,
            Quantity.gap,
            list(by_prompt.values()),
            noise.gap,
            noise.texts,
        )
        for (head, length, batch), by_prompt in groups.items()
    ]


def certify_logits(
    model: DeepseekV4ForCausalLM,
    stacks: dict[str, MtpStack],
    traces: list[Trace],
    limits: Limits,
    length: int,
    loops: list[LoopRun],
) -> tuple[LogitsTest, dict[str, DraftNoise]]:
    """Hold decoding against transformers' forward, loops against plain decoding, and drafts against the rollout.

    Args:
        model: the backbone.
        stacks: heads by name.
        traces: the first few different prompts are decoded.
        limits: end of the texts; they are cut to `NEW_TOKENS`.
        length: the longest K.
        loops: the greedy runs.

    Returns:
        The test, and the rounding of drafts by head.
    """
    differences, backbone = against_upstream(model, stacks, distinct_prompts(traces, CONTEXT), limits, length)
    differences += against_plain(loops, backbone)
    short = distinct_prompts(traces, max(1, model.config.sliding_window // 2))
    noises, drafts = {}, {}
    for name, stack in stacks.items():
        of_head, noises[name] = against_rollout(model, name, stack, short, length)
        differences += of_head
        (gaps,) = [one for one in of_head if one.quantity is Quantity.gap]
        drafts[name] = DraftNoise(noises[name].gap, np.abs(np.concatenate(gaps.texts)))
    return judge_all(differences, backbone, noises), drafts


def judge_all(differences: list[Differences], backbone: RoundingNoise, drafts: dict[str, RoundingNoise]) -> LogitsTest:
    """Judge all comparisons together at `LEVEL`."""
    comparisons = [judge(one, LEVEL / len(differences)) for one in differences]
    passed = all(one.outcome is not Outcome.failed for one in comparisons)
    return LogitsTest(passed, LEVEL, backbone, drafts, comparisons)
