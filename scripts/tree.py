"""Print the map of the tree for CONTRIBUTING.md: files and lines of every folder, at the present commit.

python scripts/tree.py
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "mtptrain"
COUNTED = {".py", ".sh", ".sbatch", ".yaml", ".md", ".html", ".css", ".jsonl"}
CONTENTS = {
    "conf/": "values only; a recipe's file picks its program by `task`",
    "docs/": "explanations that need more room than a docstring",
    "examples/": "a notebook, data, prompts, a template, a loss and a recipe from outside, V4-Flash in miniature",
    "kernels/": "compute ops, a folder each: definition, PyTorch, Triton",
    "mtptrain/": "command line, help, errors, `Batch`, names of the interface from Python",
    "mtptrain/api/": "the interface from Python",
    "mtptrain/backbone/": "the frozen DeepSeek-V4: loading, residual streams, rewindable cache, decode step",
    "mtptrain/certificate/": "checks that the output is the backbone's own",
    "mtptrain/config/": "typed settings with units, ranges and rules",
    "mtptrain/data/": "documents, text, tokens, chat, packing, batches",
    "mtptrain/data/streaming/": "text read lazily, exact on any number of processes",
    "mtptrain/decoding/": "plain and speculative decoding, drafting, policies",
    "mtptrain/doctor/": "diagnosis of a head: tensors and wirings",
    "mtptrain/evaluation/": "results as types, metrics, speed, comparison",
    "mtptrain/evaluation/report/": "tables, plots and the HTML pages",
    "mtptrain/export/": "a trained head in the format that servers load",
    "mtptrain/generation/": "text on the screen while it is decoded",
    "mtptrain/hidden_cache/": "residual streams of a text on disk",
    "mtptrain/losses/": "training objectives",
    "mtptrain/mtp/": "MTP block, stack, rollout, initial weights",
    "mtptrain/planning/": "cost of decoding and training from data sheets",
    "mtptrain/release/": "DeepSeek-V4's stored format: shards, names, FP8 and FP4",
    "mtptrain/replay/": "acceptance for every draft length from one pass",
    "mtptrain/run/": "processes, folders, atomic files, provenance, metrics",
    "mtptrain/run/trackers/": "W&B, TensorBoard, MLflow",
    "mtptrain/serving/": "acceptance in a running server",
    "mtptrain/traces/": "prompts and the backbone's continuations",
    "mtptrain/training/": "training loop, checkpoints, engines",
    "recipes/": "the programs and `session.py`, the only place where parts are wired together",
    "scripts/": "launchers, benchmarks, lock file",
    "tests/": "mirrors the library",
}


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def folder_of(file: PurePosixPath) -> str:
    """Return the row of the map that a file counts for: its top-level folder; in the library, its whole folder."""
    depth = len(file.parts) - 1 if file.parts[0] == LIBRARY else 1
    return "/".join(file.parts[:depth]) + "/"


def main() -> None:
    """Print a Markdown table; links to folders and the shipped backbone are not counted."""
    num_files: Counter[str] = Counter()
    num_lines: Counter[str] = Counter()
    for name in git("ls-files"):
        path, file = ROOT / name, PurePosixPath(name)
        if file.suffix in COUNTED and len(file.parts) > 1 and "shipped" not in file.parts and path.is_file():
            num_files[folder_of(file)] += 1
            num_lines[folder_of(file)] += len(path.read_text(encoding="utf-8").splitlines())
    print(f"At commit {git('rev-parse', '--short', 'HEAD')[0]}, printed by `python scripts/tree.py`:\n")
    print("| folder | holds | files | lines |\n|---|---|---|---|")
    for folder, contents in CONTENTS.items():
        print(f"| `{folder}` | {contents} | {num_files.pop(folder, 0)} | {num_lines[folder]:,} |")
    for folder in num_files:
        print(f"scripts/tree.py: {folder} has no entry in CONTENTS", file=sys.stderr)


if __name__ == "__main__":
    main()
