"""Time replay against the decoding loop, the engine against `generate`, and speculative against plain decoding.

python scripts/benchmark_decoding.py [PROMPTS]

On the shipped tiny backbone with its stock head, 96 tokens of held-out text a prompt, 64 new ones, greedy, one thread.
They run in turn on each prompt, so that a slow moment of the machine affects them all. Times are those of the
processor, which other programs disturb less; recording the engine's steps is not counted. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import quantiles

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import make_indexers_causal
from mtptrain.backbone.load import load_backbone
from mtptrain.backbone.streams import run_backbone
from mtptrain.backbone.traced import BREAK_EVEN, repeated
from mtptrain.config import BackboneConfig, DataConfig
from mtptrain.data.text import heldout_documents
from mtptrain.data.tokens import Encoder, cache_folder, tokenize_corpus
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.mtp.stack import stack_from_tensors
from mtptrain.mtp.start import place, stock_tensors
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.replay import replay_all
from mtptrain.run.provenance import git_commit, processor_name
from mtptrain.traces.file import record_traces
from mtptrain.traces.prompts import Prompt, slice_prompts

NEW_TOKENS, LONGEST, BATCH = 64, 8, 8


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of `work`, seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    lower, median, upper = quantiles(values, n=4, method="inclusive")
    return {"lower": lower, "median": median, "upper": upper}


@torch.inference_mode()
def is_greedy_text(model: DeepseekV4ForCausalLM, prompt: list[int], text: list[int]) -> bool:
    """Return whether every token is the likeliest one in transformers' forward pass over the whole text."""
    _, hidden_1SD = run_backbone(model, torch.tensor([prompt + text]))
    return model.lm_head(hidden_1SD[0, len(prompt) - 1 : -1]).argmax(-1).tolist() == text


def generate(model: DeepseekV4ForCausalLM, prompts: list[Prompt], least: int = 0) -> list[list[int]]:
    """Return at least `least` tokens of transformers' `generate`, greedy, for prompts of one length."""
    ids = torch.tensor([prompt.tokens for prompt in prompts])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=least, do_sample=False, pad_token_id=0)
    texts: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return texts


def time_batches(eager: DeepseekV4ForCausalLM, model: DeepseekV4ForCausalLM, prompts: list[Prompt]) -> list[float]:
    """Return the time of `generate` over the engine's for each batch of `BATCH` prompts."""
    ratios = []
    tokens = [prompt.tokens for prompt in prompts]
    decode_plain(model, tokens[:BATCH], Limits(NEW_TOKENS))  # records the step
    for start in range(0, len(prompts) - BATCH + 1, BATCH // 2):
        rows = slice(start, start + BATCH)
        reference = seconds(partial(generate, eager, prompts[rows], NEW_TOKENS))
        ratios.append(reference / seconds(partial(decode_plain, model, tokens[rows], Limits(NEW_TOKENS))))
    return ratios


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    backbone = load_backbone(BackboneConfig(), torch.device("cpu"), torch.float32)
    model = backbone.model
    # `generate` needs transformers' own attention, with its cache.
    eager = DeepseekV4ForCausalLM.from_pretrained(backbone.folder, dtype=torch.float32).eval()
    make_indexers_causal(eager)
    stack = place(stack_from_tensors(model.config, 1, stock_tensors(backbone), "stock"), backbone).eval()
    documents = heldout_documents(DataConfig())
    corpus = tokenize_corpus(documents, Encoder(backbone.tokenizer, backbone.source.bos_eos), cache_folder(None))
    prompts = slice_prompts(corpus, count, 96)
    limits = Limits(NEW_TOKENS, backbone.source.ends.stop)
    traces = record_traces(model, prompts, limits, GREEDY, 0)
    rows: dict[str, list[float]] = {name: [] for name in ("transformers", "engine", "k1", "k2", "k4")}
    for k in range(LONGEST + 1):  # records the steps
        decode_speculative(model, MtpProposer(model, stack) if k else None, [prompts[0].tokens], k, limits)
    loops, same = 0.0, {"generate": 0, "engine": 0}
    for prompt, trace in zip(prompts, traces, strict=True):
        rows["transformers"].append(seconds(partial(generate, eager, [prompt])))
        rows["engine"].append(seconds(lambda p=prompt: decode_plain(model, [p.tokens], limits)))
        texts = (generate(eager, [prompt])[0], trace.tokens)
        for name, text in zip(same, texts, strict=True):
            same[name] += is_greedy_text(model, prompt.tokens, text)
        for k in range(1, LONGEST + 1):
            spent = seconds(
                lambda p=prompt, k=k: decode_speculative(model, MtpProposer(model, stack), [p.tokens], k, limits)
            )
            loops += spent
            if f"k{k}" in rows:
                rows[f"k{k}"].append(spent)
    replay = min(
        seconds(lambda: replay_all(draft_traces(model, stack, traces, LONGEST, GREEDY), GREEDY)) for _ in range(3)
    )
    ratios = {
        f"engine over transformers, batch {BATCH}": spread(time_batches(eager, model, prompts)),
        "engine over transformers": spread([a / b for a, b in zip(rows["transformers"], rows["engine"], strict=True)]),
        **{
            f"speculative K={k} over plain": spread([a / b for a, b in zip(rows["engine"], rows[f"k{k}"], strict=True)])
            for k in (1, 2, 4)
        },
    }
    print(f"{processor_name()}, one thread, {count} prompts of 96 tokens, {NEW_TOKENS} new, greedy, stock head")
    print(f"texts equal to transformers' full forward pass: engine {same['engine']}, generate {same['generate']}")
    for name, ratio in ratios.items():
        print(f"{name:32s} {ratio['median']:.2f}x (quartiles {ratio['lower']:.2f} to {ratio['upper']:.2f})")
    print(f"replay of K=1..{LONGEST}: {replay:.2f} s; the loop for the same: {loops:.1f} s; {loops / replay:.0f} times")
    result = {"commit": git_commit(), "prompts": count, "same_text": same, "ratios": ratios}
    print(json.dumps({**result, "replay_seconds": replay, "loop_seconds": loops}))


if __name__ == "__main__":
    with repeated(BREAK_EVEN):
        main()
