"""Plant each wrong wiring, and a cache that is not rewound, and print what the certificate finds (docs/evaluation.md).

python scripts/certificate_power.py [PROMPTS]

On the shipped tiny backbone with its stock head, PROMPTS (default 8) held-out prompts of 32 tokens, 24 new ones, K=4,
fp32 and bf16, one thread. A wiring is planted in the rollout that replay and controls run; the loop keeps the right
one. `embedding_early` needs a head that learned to use the leak: `shifted target` therefore also drafts with a rollout
whose state is the target itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mtptrain.backbone import decode
from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.certificate.drafts import against_rollout
from mtptrain.certificate.logits import against_upstream, distinct_prompts, judge_all
from mtptrain.certificate.shifted_target import shifted_target_control
from mtptrain.config import BackboneConfig, DataConfig
from mtptrain.data.text import heldout_documents
from mtptrain.data.tokens import Encoder, cache_folder, tokenize_corpus
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.doctor.wirings import RIGHT, WIRINGS, Wiring
from mtptrain.evaluation.certificate_result import LogitsTest
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.mtp.start import place, stock_tensors
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.replay import replay_passes
from mtptrain.run.provenance import git_commit, processor_name
from mtptrain.traces.file import Trace, record_traces
from mtptrain.traces.prompts import slice_prompts

PROMPT_TOKENS, NEW_TOKENS, LENGTH = 32, 24, 4


@contextmanager
def stale_entries() -> Iterator[None]:
    """Keep the first entry that a compression window gets, though a rejected draft closed the window."""
    compress = decode._compress

    def keep_first(module: object, state: decode.CompressorState, windows: object, inputs_BSD: Tensor) -> None:
        before = state.entries_BWC.clone()
        compress(module, state, windows, inputs_BSD)  # type: ignore[arg-type]
        was_written = (before != 0).any(-1, keepdim=True)
        was_written[:, -1] = False  # scratch space
        state.entries_BWC.copy_(torch.where(was_written, before, state.entries_BWC))

    decode._compress = keep_first  # type: ignore[assignment]
    try:
        yield
    finally:
        decode._compress = compress


def describe(test: LogitsTest) -> str:
    """Return whether the test failed, with the comparison that is furthest beyond its bound."""
    sizes = [(one.texts, size) for one in test.comparisons for size in (one.typical, one.largest)]
    texts, worst = max(sizes, key=lambda one: one[1].median / one[1].bound)
    word = "passed" if test.passed else "FOUND"
    return f"{word}: {worst.median:.1e}, bound {worst.bound:.1e}, {worst.beyond} of {texts} texts"


def check_wiring(backbone: Backbone, stack: MtpStack, traces: list[Trace], wiring: Wiring) -> list[str]:
    """Return the findings about a rollout that is wired like this."""
    model = backbone.model
    prompt_length = len(traces[0].prompt.tokens)
    shifted = shifted_target_control(model, {"h": stack}, traces, LENGTH, wiring.build(model, prompt_length))["h"]
    short = distinct_prompts(traces, model.config.sliding_window // 2)
    differences, noise = against_rollout(model, "stock", stack, short, LENGTH, wiring.build(model, len(short[0])))
    logits = judge_all(differences, noise, {"stock": noise})
    drafts = draft_traces(model, stack, traces, LENGTH, GREEDY, wiring.build(model, prompt_length))
    limits = Limits(NEW_TOKENS)
    rows = [
        decode_speculative(model, MtpProposer(model, stack), [trace.prompt.tokens], LENGTH, limits).rows[0]
        for trace in traces
    ]
    same = sum(
        row.passes == replay_passes(one, GREEDY, LENGTH)
        for row, one, trace in zip(rows, drafts, traces, strict=True)
        if row.tokens == trace.tokens
    )
    p_value = "-" if shifted.p_value is None else f"p={shifted.p_value:.1e}"
    return [f"{shifted.outcome.value}, {p_value}", f"{same} of {len(traces)} equal", describe(logits)]


def main() -> None:
    """Plant every fault, and print a row for each."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print(f"{processor_name()}, one thread, {count} prompts, commit {git_commit()}\n")
    for dtype in (torch.float32, torch.bfloat16):
        backbone = load_backbone(BackboneConfig(), torch.device("cpu"), dtype)
        stack = place(stack_from_tensors(backbone.config, 1, stock_tensors(backbone), "stock"), backbone).eval()
        encoder = Encoder(backbone.tokenizer, backbone.source.bos_eos)
        corpus = tokenize_corpus(heldout_documents(DataConfig()), encoder, cache_folder(None))
        limits = Limits(NEW_TOKENS)
        traces = record_traces(backbone.model, slice_prompts(corpus, count, PROMPT_TOKENS), limits, GREEDY, 0)
        name = str(dtype).removeprefix("torch.")
        print(f"| {name}, fault | shifted target | replay = loop | logits of decoding or drafts |\n|---|---|---|---|")
        for wiring in WIRINGS:
            label = "none" if wiring.name == RIGHT else f"rollout wired {wiring.name}"
            print(f"| {label} | {' | '.join(check_wiring(backbone, stack, traces, wiring))} |", flush=True)
        prompts = distinct_prompts(traces, PROMPT_TOKENS)
        differences, noise = against_upstream(backbone.model, {"stock": stack}, prompts, limits, LENGTH)
        print(f"| none (decoding) | - | - | {describe(judge_all(differences, noise, {}))} |", flush=True)
        with stale_entries():
            differences, noise = against_upstream(backbone.model, {"stock": stack}, prompts, limits, LENGTH)
        print(f"| compressor not rewound | - | - | {describe(judge_all(differences, noise, {}))} |\n", flush=True)


if __name__ == "__main__":
    main()
