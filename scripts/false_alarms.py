"""Simulate evaluations of a sound head, and count those that the shifted target control fails (docs/evaluation.md).

python scripts/false_alarms.py [EVALUATIONS]

The shipped tiny backbone writes a pool of texts of each kind, and its stock head drafts on them once. Each of the
EVALUATIONS (default 10000) of a kind draws 2, 4, 8, 16 or 32 texts of the pool without replacement and runs the control
as `+recipe=evaluate` does, but looks the drafts up: they do not depend on the text after the splice
(tests/certificate/test_shifted_target.py). The last column runs 20 of them with a head that reads its target. The last
line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.backbone.streams import run_backbone
from mtptrain.certificate.shifted_target import (
    LEVEL,
    Matches,
    Splice,
    is_tested,
    match,
    p_value,
    plan_splices,
    text_generator,
)
from mtptrain.config import BackboneConfig, DataConfig
from mtptrain.data.text import heldout_documents
from mtptrain.data.tokens import Encoder, cache_folder, tokenize_corpus
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Limits
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.mtp.start import place, stock_tensors
from mtptrain.replay.drafts import trace_batch
from mtptrain.run.provenance import git_commit, processor_name
from mtptrain.traces.file import Trace, record_traces
from mtptrain.traces.prompts import Prompt, slice_prompts

POOL, NEW_TOKENS, STEPS = 192, 24, 4
SIZES = (2, 4, 8, 16, 32)
LEAKING = 20  # evaluations of a head that reads its target
SUFFIX = "\n\nWrite the steps first and close with the result on a line of its own.\n\n"
OPENING = 'def answer(self, *args, **kwargs):\n    """Return the result'

Drafts = dict[int, np.ndarray]  # by position of the continuation, int64 [min(K, m)]


def kinds(prompts: list[Prompt], encode: Callable[[str], list[int]]) -> dict[str, list[Prompt]]:
    """Return a pool of prompts of each kind."""
    suffix, opening = encode(SUFFIX), encode(OPENING)
    few = [prompts[number % 8] for number in range(POOL)]
    return {
        "held-out text": prompts,
        "one instruction as the suffix of all": [replace(one, tokens=one.tokens[:32] + suffix) for one in prompts],
        "one pre-filled answer": [replace(one, tokens=one.tokens[:32] + suffix + opening) for one in prompts],
        "copies of eight prompts": few,
        "one prompt": [prompts[0]] * POOL,
    }


@torch.inference_mode()
def draft_everywhere(backbone: Backbone, stack: MtpStack, traces: list[Trace]) -> list[Drafts]:
    """Return a head's drafts of every token of the texts but the first."""
    model, drafts = backbone.model, []
    for trace in traces:
        batch = trace_batch([trace], torch.device("cpu"))
        streams, _ = run_backbone(model, batch.tokens_BS)
        states = rollout(stack, model.model.embed_tokens, streams, batch, STEPS)
        chosen_KS = torch.stack([model.lm_head(state[0]).argmax(-1) for state in states]).numpy()
        first = len(trace.prompt.tokens)
        drafts.append(
            {
                cut: np.array([chosen_KS[k - 1, first + cut - k - 1] for k in range(1, min(STEPS, cut) + 1)])
                for cut in range(1, len(trace.tokens))
            }
        )
    return drafts


def simulate(texts: list[list[int]], drafts: list[Drafts] | None) -> float | None:
    """Return the control's p-value; None if it is not tested. Without drafts, the head reads its target."""
    generator = text_generator(texts)
    splices = plan_splices(texts, generator)
    if not is_tested(texts, splices):
        return None
    return p_value([_matches(splice, texts, drafts) for splice in splices], generator)


def _matches(splice: Splice, texts: list[list[int]], drafts: list[Drafts] | None) -> Matches:
    if drafts is not None:
        return match(np.stack([drafts[row][splice.position] for row in splice.rows]), splice, texts)
    targets = [[texts[splice.rows[future]][splice.position]] for future in splice.futures]
    return match(np.array(targets), splice, texts)


def main() -> None:
    """Simulate, and print the table."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    backbone = load_backbone(BackboneConfig(), torch.device("cpu"), torch.float32)
    stack = place(stack_from_tensors(backbone.config, 1, stock_tensors(backbone), "stock"), backbone).eval()
    encoder = Encoder(backbone.tokenizer, backbone.source.bos_eos)
    corpus = tokenize_corpus(heldout_documents(DataConfig()), encoder, cache_folder(None))
    limits = Limits(NEW_TOKENS, frozenset(backbone.source.bos_eos[1]))
    generator, rows = np.random.default_rng(0), {}
    print("| texts | evaluations | not tested | p <= 0.1 | p <= 0.01 | p <= 0.001 | failed | leak found |")
    print("|---|---|---|---|---|---|---|---|")
    pools = kinds(
        slice_prompts(corpus, POOL, 64), lambda text: backbone.tokenizer.encode(text, add_special_tokens=False).ids
    )
    for kind, prompts in pools.items():
        traces = record_traces(backbone.model, prompts, limits, GREEDY, 0)
        texts, drafts = [trace.tokens for trace in traces], draft_everywhere(backbone, stack, traces)
        values: list[float | None] = []
        noticed = leaking = 0
        started = time.perf_counter()
        for _ in range(count):
            drawn = generator.choice(POOL, generator.choice(SIZES), replace=False)
            chosen = [texts[number] for number in drawn]
            values.append(simulate(chosen, [drafts[number] for number in drawn]))
            if values[-1] is not None and leaking < LEAKING:
                leaking += 1
                leaked = simulate(chosen, None)
                noticed += leaked is not None and leaked <= LEVEL
        tested = np.array([value for value in values if value is not None])
        shares = [float((tested <= level).mean()) if len(tested) else None for level in (0.1, 0.01, 0.001)]
        failed = int((tested <= LEVEL).sum())
        cells = ["-" if share is None else f"{share:.4f}" for share in shares]
        row = [kind, f"{count:,}", f"{count - len(tested):,}", *cells, str(failed), f"{noticed} of {leaking}"]
        print(f"| {' | '.join(row)} |", flush=True)
        rows[kind] = {"evaluations": count, "tested": len(tested), "shares": shares, "failed": failed, "found": noticed}
        rows[kind]["seconds"] = time.perf_counter() - started
    print(f"{processor_name()}, one thread; level {LEVEL:.0e}; stock head of the tiny backbone, K={STEPS}")
    print(json.dumps({"commit": git_commit(), "kinds": rows}))


if __name__ == "__main__":
    main()
