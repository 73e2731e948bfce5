"""Time this commit against an earlier one: plain decoding, verify pass, draft and training step, in turn.

python scripts/benchmark_commits.py [--before b47bb27] [--rounds 12] [--work steps,passes,...]

The earlier commit gets a worktree of its own in a temporary folder, each commit a process with one thread
(`commit_worker.py`), and the two do the same work by turns, so that a slow moment of the machine affects both: shipped
backbone and stock head, 96 tokens of held-out text a prompt, 64 new ones, greedy; verify passes of five tokens, drafts
of four; training steps of `+recipe=distill` on the same batches. A ratio is that of a pair of turns. Both commits must
emit the same texts, and the losses of the training are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig, DataConfig
from mtptrain.data.batches import PackedBatches
from mtptrain.data.text import heldout_documents, training_documents
from mtptrain.data.tokens import Encoder, cache_folder, tokenize_corpus
from mtptrain.kernels.bench.measure import quartiles
from mtptrain.run.provenance import git_commit, processor_name
from mtptrain.traces.prompts import slice_prompts

ROOT = Path(__file__).resolve().parent.parent
WORK = {
    "plain 1": "plain decoding, batch 1, tokens/s",
    "plain 8": "plain decoding, batch 8, tokens/s",
    "passes": "verify passes of 5 tokens /s",
    "drafts": "drafts of 4 tokens /s",
    "steps": "training, tokens/s",
}
PROMPTS, BATCHES, WARM_UP = 16, 64, 3


def write_inputs(path: Path) -> None:
    """Write the backbone's folder, prompts and training batches for both sides."""
    backbone = load_backbone(BackboneConfig(), torch.device("cpu"), torch.float32)
    encoder, data = Encoder(backbone.tokenizer, backbone.source.bos_eos), DataConfig()
    heldout, training = (
        tokenize_corpus(read(data), encoder, cache_folder(None)) for read in (heldout_documents, training_documents)
    )
    source = PackedBatches(training, data.sequence_length, batch_size=4, seed=0)
    batches = [source.batch(number) for number in range(BATCHES)]
    inputs = {
        "folder": str(backbone.folder),
        "prompts": [prompt.tokens for prompt in slice_prompts(heldout, PROMPTS, 96)],
        "batches": [(batch.tokens_BS, batch.segment_BS, batch.position_BS) for batch in batches],
    }
    torch.save(inputs, path)


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


class Side:
    """The worker of one commit."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "scripts" / "commit_worker.py"), str(inputs)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, **pipes)
        self._answer()

    def do(self, work: str) -> dict[str, Any]:
        """Return the answer to a piece of work."""
        assert self.process.stdin is not None
        print(work, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("benchmark_commits: a worker ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(sides: dict[str, Side], names: list[str], rounds: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the answers by work and side, warm-up left out; the side that begins alternates."""
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {name: {side: [] for side in sides} for name in names}
    for number in range(WARM_UP + rounds):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            for side in order:
                answers[name][side].append(sides[side].do(name))
    return answers


def summarize(answers: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, tuple[float, float, float]]:
    """Return the quartiles of the units per second of both sides, and of the paired ratio after / before."""
    rates = {side: [one["units"] / one[clock] for one in turns[WARM_UP:]] for side, turns in answers.items()}
    ratios = [new / old for new, old in zip(rates["after"], rates["before"], strict=True)]
    return {side: quartiles(values) for side, values in rates.items()} | {"ratio": quartiles(ratios)}


def losses(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the losses of the first draft step on both sides, and the largest difference of any."""
    steps = {side: [step for turn in turns for step in turn["outcome"]] for side, turns in answers.items()}
    pairs = list(zip(steps["before"], steps["after"], strict=True))
    differences = [max(abs(a - b) for a, b in zip(old, new, strict=True)) for old, new in pairs]
    first = {side: [step[0] for step in values] for side, values in steps.items()}
    return {"step_1": first, "differences": differences}


def print_row(name: str, clock: str, figures: dict[str, tuple[float, float, float]]) -> None:
    """Print a row of the table."""
    form = {"before": ".1f", "after": ".1f", "ratio": ".2f"}
    cells = [
        f"{middle:{form[key]}} ({low:{form[key]}} to {high:{form[key]}})"
        for key, (low, middle, high) in figures.items()
    ]
    print(f"| {name} | {clock} | {' | '.join(cells)} |", flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="b47bb27", help="the earlier commit (default b47bb27)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side (default 12)")
    parser.add_argument("--work", default=",".join(WORK), help=f"parts of it, from {', '.join(WORK)} (default all)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    if unknown := [name for name in options.work.split(",") if name not in WORK]:
        parser.error(f"--work={unknown[0]} does not exist; use {', '.join(WORK)}")
    return options


def run(options: argparse.Namespace, sides: dict[str, Side]) -> dict[str, Any]:
    """Measure, print the tables, and return the content of the JSON line."""
    names = options.work.split(",")
    launches = {side: worker.do("launches")["outcome"] for side, worker in sides.items()}
    answers = measure(sides, names, options.rounds)
    result: dict[str, Any] = {"launches": launches, "rates": {}}
    print(f"{processor_name()}, one thread a side, torch {torch.__version__}, median and quartiles of {options.rounds}")
    print(
        f"| work | time | before ({options.before}) | after ({git_commit()[:7]}) | after / before |\n"
        + "|---" * 5
        + "|"
    )
    for name in names:
        result["rates"][name] = {clock: summarize(answers[name], clock) for clock in ("processor", "wall")}
        for clock, figures in result["rates"][name].items():
            print_row(WORK[name], clock, figures)
    print("\n| launches (copies) | before | after |\n|---|---|---|")
    for name in launches["before"]:
        cells = [f"{figures[name]['all']:.0f} ({figures[name]['copies']:.0f})" for figures in launches.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    for name in [name for name in names if name != "steps"]:
        before, after = ([turn["outcome"] for turn in answers[name][side]] for side in ("before", "after"))
        print(f"{WORK[name]}: {'the same tokens' if before == after else 'OTHER TOKENS'} on both sides")
    if "steps" in names:
        result["losses"] = losses(answers["steps"])
        far, last = max(result["losses"]["differences"]), {s: v[-1] for s, v in result["losses"]["step_1"].items()}
        print(
            f"losses of {len(result['losses']['differences'])} training steps differ by at most {far:.2g} nats; {last}"
        )
    return result


def main() -> None:
    """Measure both commits and print the result."""
    options = parse()
    with worktree(options.before) as folder, tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.pt"
        write_inputs(inputs)
        sides = {"before": Side(folder, inputs), "after": Side(ROOT, inputs)}
        try:
            result = run(options, sides)
        finally:
            for side in sides.values():
                side.process.terminate()
    print(json.dumps({"commits": {"before": options.before, "after": git_commit()}, **result}))


if __name__ == "__main__":
    main()
