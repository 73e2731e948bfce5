"""Run recipes in two processes as on two nodes with disks of their own, where only the second node has a fault.

python -m torch.distributed.run --nproc-per-node 2 -m tests.recipes.other_node FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from mtptrain import cli
from mtptrain.backbone import load
from mtptrain.run import preemption
from mtptrain.run.distributed import leave
from tests.command import SMALL, edit_tensors, run_main
from tests.warm import output_in

KILLED = "killed"  # the fault that ends the process, hence the last one
JOBS = [  # fault, placement, recipe
    ("missing", "replicate", "distill"),
    ("truncated", "zero3", "collect"),
    ("mismatched", "expert_parallel", "evaluate"),
    (KILLED, "expert_parallel", "distill"),
]
SHARD = "model-00003-of-00007.safetensors"


def make_nodes(folder: Path, release: Path) -> None:
    """Write a node's disk for every fault, and one without: each has a release at `R`."""
    for name in ("whole", *(fault for fault, *_ in JOBS)):
        shutil.copytree(release, folder / name / "R")
    (folder / "missing" / "R" / SHARD).unlink()
    with (folder / "truncated" / "R" / SHARD).open("r+b") as file:
        file.truncate(1000)
    edit_tensors(SHARD, _cut_first)(folder / "mismatched" / "R")


def _cut_first(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("attn.wq_a.weight"))
    tensors[name] = tensors[name][:7].clone()


def arguments(folder: Path, corpus: Path, number: int) -> list[str]:
    """Return the command of a job."""
    _, placement, recipe = JOBS[number]
    own = {"distill": ["train.steps=1", "train.batch_size=2"], "evaluate": ["checkpoint=stock"]}.get(recipe, [])
    where = ["backbone.path=R", f"backbone.placement={placement}", f"output_dir={folder}/run{number}"]
    return [f"+recipe={recipe}", "data=text", f"data.path={corpus}", *where, *own, *SMALL]


def main(folder: Path, corpus: Path) -> None:
    """Run the jobs one after the other; job N leaves its output in `N.RANK.txt`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher of another node would send none
    preemption.SIGNALS = ()  # type: ignore[assignment]
    number = int(os.environ["RANK"])
    for job, (fault, *_) in enumerate(JOBS):
        os.chdir(folder / (fault if number else "whole"))
        with (
            output_in(folder / f"{job}.{number}.txt"),
            patch.object(load, "_check_report", wraps=load._check_report) as read,
            patch.object(cli, "PATIENCE_SECONDS", 0),
        ):
            if number and fault == KILLED:
                read.side_effect = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            print("exit code", run_main(*arguments(folder, corpus, job)))
            leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
