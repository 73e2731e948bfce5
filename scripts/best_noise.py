"""Print how precisely checkpoints of a run are told apart by greedy and by expected acceptance: widths of intervals.

python scripts/best_noise.py outputs/distill/RUN
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from mtptrain.config import DecodingConfig, EvaluationConfig, RunConfig
from mtptrain.evaluation.metrics import paired_gain
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import gather_traces, replay_head
from mtptrain.run.folder import open_run_folder
from mtptrain.training.run_checkpoints import checkpoints_of_run, steps_of_run

PROMPTS, SIZES, LENGTH = 64, (16, 64), 4


def print_widths(run: Path, temperature: float, folder: str) -> None:
    """Print the width of the paired 95 % interval of each checkpoint's gain over the one before.

    Args:
        run: of the shipped tiny backbone.
        temperature: of the texts and their replay.
        folder: for the run's files; nothing is kept.
    """
    decoding = DecodingConfig(temperature=temperature, draft_length=LENGTH)
    evaluation = EvaluationConfig(num_prompts=PROMPTS)
    config = RunConfig(task="evaluate", output_dir=folder, checkpoint="stock", decoding=decoding, evaluation=evaluation)
    session = Session(config, open_run_folder(config, {}))
    traces = gather_traces(session, PROMPTS).traces
    heads = {"stock": "stock"} | {f"step {k}": str(path) for k, path in steps_of_run(checkpoints_of_run(run)).items()}
    counts = {name: replay_head(session, session.head(path).stack, traces)[LENGTH] for name, path in heads.items()}
    for size in SIZES:
        rows = [number * len(traces) // size for number in range(size)]
        groups = [traces[row].prompt.group for row in rows]
        for before, after in [*pairwise(counts), ("stock", list(counts)[-1])]:
            gain = paired_gain(*([counts[name][row] for row in rows] for name in (before, after)), groups)
            if gain is not None:
                low, high = gain.interval
                print(
                    f"temperature {temperature:g}, {size} prompts, {after} over {before}: {high - low:.3f}", flush=True
                )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/best_noise.py RUN")
    with tempfile.TemporaryDirectory() as name:
        for value in (0.0, 1.0):
            print_widths(Path(sys.argv[1]), value, f"{name}/{value}")
