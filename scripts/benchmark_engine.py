"""Time the decoding engine: recorded verify passes against eager ones, and the gain of a head.

python scripts/benchmark_engine.py [--backbone FOLDER --head RUN] [--batches 1,8] [--draft-length 4] [--device cpu]
python scripts/benchmark_engine.py --random v4_flash --layers 4 --experts 16

The first form measures a backbone and a head, by default the shipped ones. The second takes random weights of a
preset's sizes, V4-Flash's widths in 5 GB: no draft is accepted, but passes and drafts take their time. A pass reads 1
to K + 1 new tokens of every row after 96 tokens of text, recorded and plain in turn. Then 64 tokens are decoded
greedily, plainly and with every draft length in turn. The time of a pass includes all its work on the GPU but not the
recording. A GPU records CUDA graphs, a CPU traces. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from random_weights import random_model
from torch import Tensor

from mtptrain.backbone.decode import prefill
from mtptrain.backbone.frozen import DeepseekV4ForCausalLM
from mtptrain.backbone.traced import BREAK_EVEN
from mtptrain.config import BackboneConfig, Device, RunConfig
from mtptrain.decoding.policy import GREEDY
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache
from mtptrain.decoding.steps import verify_step
from mtptrain.errors import UserError
from mtptrain.evaluation.median import spread
from mtptrain.evaluation.speedup import batch_length, cut_batches, run_interleaved, summarize_speed
from mtptrain.evaluation.speedup import tokens_per_second as rate_of
from mtptrain.kernels.dispatch import requested
from mtptrain.mtp.stack import MtpStack
from mtptrain.recipes.session import Session
from mtptrain.run.distributed import choose_device
from mtptrain.run.folder import open_run_folder
from mtptrain.run.provenance import git_commit, hardware, package_versions
from mtptrain.run.typed_json import to_json
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt, slice_prompts

# B rows, S tokens of a prompt, L tokens of a pass

Figures = dict[str, Any]  # by name, as JSON values

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 64
WARM_UP, REPETITIONS = 3, 30
ROOM = 4  # passes that recording may run before the first rewind


class Passes:
    """Verify passes over the next tokens of some texts; the cache is rewound after each.

    Args:
        model: the verifier.
        prompts: the texts, all of one length.
        longest: most tokens of a pass.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, prompts: list[Prompt], longest: int) -> None:
        self.device = model.lm_head.weight.device
        tokens_BS = torch.tensor([prompt.tokens for prompt in prompts], device=self.device)
        self.tokens_BL = tokens_BS[:, :longest]  # any tokens will do
        self.cache = allocate_cache(model, len(prompts), PROMPT_TOKENS + ROOM * longest, longest)
        for _ in prefill(model, self.cache, tokens_BS, [PROMPT_TOKENS] * len(prompts)):
            pass
        self.length_B = self.cache.length_B.clone()
        recorded = verify_step(model, self.cache, BREAK_EVEN)
        self.ways: dict[str, Callable[[Tensor], Any]] = {"eager": recorded.function}
        if recorded.is_static:
            self.ways["recorded"] = recorded

    def seconds(self, way: str, num_tokens: int) -> float:
        """Return the wall time of one pass, seconds."""
        tokens_BL = self.tokens_BL[:, :num_tokens].contiguous()
        self._wait()
        begun = time.perf_counter()
        self.ways[way](tokens_BL)
        self._wait()
        spent = time.perf_counter() - begun
        self.cache.rewind(self.length_B)
        return spent

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def time_passes(model: DeepseekV4ForCausalLM, prompts: list[Prompt], longest: int) -> Figures:
    """Return, by number of tokens, the spread of the seconds of each way and of the paired ratio eager / recorded."""
    passes = Passes(model, prompts, longest)
    seconds_by_tokens: dict[int, dict[str, list[float]]] = {
        n: {way: [] for way in passes.ways} for n in range(1, longest + 1)
    }
    for _ in range(WARM_UP + REPETITIONS):
        for num_tokens, seconds in seconds_by_tokens.items():
            for way in passes.ways:
                seconds[way].append(passes.seconds(way, num_tokens))
    result: Figures = {}
    for num_tokens, seconds in seconds_by_tokens.items():
        kept = {way: spent[WARM_UP:] for way, spent in seconds.items()}
        result[str(num_tokens)] = {way: to_json(spread(spent)) for way, spent in kept.items()}
        if "recorded" in kept:
            ratios = [slow / fast for slow, fast in zip(kept["eager"], kept["recorded"], strict=True)]
            result[str(num_tokens)]["eager_over_recorded"] = to_json(spread(ratios))
    return result


def time_decoding(
    model: DeepseekV4ForCausalLM, stack: MtpStack, prompts: list[Prompt], batch: int, longest: int
) -> Figures:
    """Return tokens/s of plain decoding and, by draft length, tokens a pass and the ratio to plain decoding."""
    batches = cut_batches([Trace(prompt, [], [], []) for prompt in prompts], batch, PROMPTS)
    lengths, limits, head = list(range(1, longest + 1)), Limits(NEW_TOKENS), "head"
    runs = run_interleaved(model, {head: stack}, batches, lengths, limits, GREEDY, 0, lambda *_: None)
    result: Figures = {"plain_tokens_per_second": rate_of([plain for run in runs for plain in run.plain])}
    for k in lengths:
        speed = to_json(summarize_speed(runs, head, k))
        result[str(k)] = {
            "tokens_per_pass": batch_length(runs, head, k),
            "tokens_per_second": rate_of([run.speculative[head, k] for run in runs]),
            **{name: speed[name] for name in ("median", "quartiles", "after_prefill", "shares")},
            "record_seconds": to_json(spread([run.speculative[head, k].seconds.record for run in runs])),
        }
    return result


def print_batch(batch: int, passes: Figures, decoding: Figures) -> None:
    """Print two tables."""

    def cell(spread: Figures, scale: float = 1, form: str = ".2f") -> str:
        middle, (low, high) = scale * spread["median"], (scale * bound for bound in spread["quartiles"])
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    print(f"\nbatch {batch}\n| tokens of a pass | eager, ms | recorded, ms | eager / recorded |\n|---|---|---|---|")
    for num_tokens, times in passes.items():
        cells = [cell(times["eager"], 1e3), "not recorded", "-"]
        if "recorded" in times:
            cells[1:] = cell(times["recorded"], 1e3), cell(times["eager_over_recorded"])
        print(f"| {num_tokens} | " + " | ".join(cells) + " |")
    print(f"\nplain decoding {decoding['plain_tokens_per_second']:.1f} tokens/s")
    print("| K | tokens a pass | tokens/s | over plain | the same without prefill |\n|---|---|---|---|---|")
    for k, speed in decoding.items():
        if isinstance(speed, dict):
            rate, gain = f"{speed['tokens_per_second']:.1f}", f"{cell(speed)} | {cell(speed['after_prefill'])}"
            print(f"| {k} | {speed['tokens_per_pass']:.2f} | {rate} | {gain} |", flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", metavar="FOLDER", help="a model folder (default: the shipped backbone)")
    parser.add_argument("--head", metavar="RUN", default="stock", help="a run or checkpoint folder (default stock)")
    parser.add_argument("--random", metavar="PRESET", help="random weights with the sizes of conf/backbone/PRESET.yaml")
    parser.add_argument("--layers", type=int, help="with --random: the first layers only")
    parser.add_argument("--experts", type=int, help="with --random: routed experts a layer")
    parser.add_argument("--batches", default="1", help="rows decoded together, one after another (default 1)")
    parser.add_argument("--draft-length", type=int, default=4, help="largest K (default 4)")
    parser.add_argument("--device", choices=[device.value for device in Device], default=Device.auto.value)
    options = parser.parse_args()
    if options.random is None and (options.layers is not None or options.experts is not None):
        parser.error("--layers and --experts change the sizes of --random PRESET: add it, or leave them out")
    if options.random is not None and (options.backbone is not None or options.head != "stock"):
        parser.error("--random makes a backbone and a head of its own: leave out --backbone and --head")
    for name in ("layers", "experts"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    return options


def open_trained(options: argparse.Namespace) -> tuple[DeepseekV4ForCausalLM, MtpStack, Callable[[int], list[Prompt]]]:
    """Return backbone, head and a source of held-out prompts."""
    config = RunConfig(task="evaluate", backbone=BackboneConfig(path=options.backbone), device=Device(options.device))
    session = Session(config, open_run_folder(config, {}))
    corpus = session.heldout_corpus
    return session.backbone.model, session.head(options.head).stack, lambda n: slice_prompts(corpus, n, PROMPT_TOKENS)


def open_random(options: argparse.Namespace) -> tuple[DeepseekV4ForCausalLM, MtpStack, Callable[[int], list[Prompt]]]:
    """Return backbone, head and a source of prompts, all random."""
    device = choose_device(Device(options.device))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, stack = random_model(options.random, options.layers, options.experts, device, dtype)

    def prompts(count: int) -> list[Prompt]:
        tokens = torch.randint(model.config.vocab_size, (count, PROMPT_TOKENS), generator=torch.Generator())
        return [Prompt(row, "random", number) for number, row in enumerate(tokens.tolist())]

    return model, stack, prompts


def run(options: argparse.Namespace) -> Figures:
    """Measure, print the tables, and return the content of the JSON line."""
    model, stack, make_prompts = open_random(options) if options.random else open_trained(options)
    batches = [int(text) for text in options.batches.split(",")]
    prompts = make_prompts(max(PROMPTS, *batches))
    records = verify_step(model, allocate_cache(model, 1, 1, 1)).is_static
    name = f"random {options.random}" if options.random else options.backbone or "shipped"
    result: Figures = {
        "hardware": to_json(hardware()),
        "versions": package_versions(),
        "commit": git_commit(),
        "kernels": requested(),
        "backbone": name,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.lm_head.weight.dtype),
        "head": "random" if options.random else options.head,
        "recorded": records,
        "batches": {},
    }
    where = ", ".join(result["hardware"].get("gpus") or [result["hardware"]["processor"]])
    print(f"{where}, torch {torch.__version__}, {result['dtype']}, commit {result['commit']}")
    print(f"{name}: {result['layers']} layers, {result['parameters'] / 1e6:.1f} M parameters; head {result['head']}")
    if not records:
        print("nothing is recorded here: only the eager path is timed")
    for batch in batches:
        figures = {
            "passes": time_passes(model, prompts[:batch], options.draft_length + 1),
            "decoding": time_decoding(model, stack, prompts, batch, options.draft_length),
        }
        result["batches"][str(batch)] = figures
        print_batch(batch, figures["passes"], figures["decoding"])
    return result


def main() -> int:
    """Run the benchmark; return 2 after one line on a user's mistake."""
    options = parse()
    try:
        result = run(options)
    except UserError as error:
        print(f"benchmark_engine: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
