"""Every recipe on every kind of backbone, source of data and placement; each command leaves its exit code and output.

python -m torch.distributed.run --nproc-per-node 2 -m tests.recipes.matrix JOBS.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from unittest.mock import patch

import torch

from mtptrain import cli
from tests.command import SMALL, Light, run_main
from tests.warm import output_in

Job = tuple[str, list[str]]  # its name and the settings of the command
NEW_TOKENS = 4
# With the prompt as many tokens as elsewhere, more than the sliding window holds.
SMALLER = [*SMALL, *map(Light, (f"decoding.max_new_tokens={NEW_TOKENS}", "evaluation.prompt_tokens=14"))]


def jobs(
    folder: Path, backbone: Path, corpus: Path, placement: str, at_end: bool = False, shared: Collection[str] = ()
) -> list[Job]:
    """Return the commands for one backbone under one placement, in an order in which each finds what it needs.

    Args:
        folder: of all results; a command writes to the folder of its name.
        backbone: the backbone's folder.
        corpus: a .jsonl file of documents.
        placement: value of `backbone.placement`.
        at_end: whether the online training measures its head, and its head is measured with weights as they are stored
            and exported without a measurement.
        shared: names of the trainings whose processes share the experts of the head.
    """
    where = [f"backbone.path={backbone}", f"backbone.placement={placement}"]
    text = ["data=text", f"data.path={corpus}"]
    training = ["train.steps=2", "train.batch_size=2", "train.log_every=1", "evaluation.every=2"]
    short = ["evaluate_at_end=false"]
    texts = ["on_policy.num_prompts=2", "on_policy.prompt_tokens=8", f"on_policy.max_new_tokens={NEW_TOKENS}"]
    head = f"{folder}/distill-online"
    commands = {
        "distill-online": ["+recipe=distill", *text, *training, f"evaluate_at_end={at_end}"],
        "collect": ["+recipe=collect", *text],
        "distill-streams": ["+recipe=distill", "data=streams", f"data.path={folder}/collect", *training, *short],
        "distill-on_policy": [
            "+recipe=distill_on_policy",
            *text[1:],
            *training,
            *texts,
            f"on_policy.path={folder}/t",
            *short,
        ],
        "pretrain": ["+recipe=pretrain", *text, *training, *short, "mtp.init=backbone"],
        "evaluate": ["+recipe=evaluate", *text, f"checkpoint={head}"],
        "evaluate-all": ["+recipe=evaluate", *text, f"checkpoint={head}", "checkpoints=all", "evaluation.decoded=none"],
        "watch": ["+recipe=watch", *text, f"checkpoint={head}", "watch.minutes=1"],
        "doctor": ["+recipe=doctor", *text, f"checkpoint={head}"],
        "compare": ["+recipe=compare", *text, f"checkpoints=[stock,{head}]"],
        "export": ["+recipe=export", *text, f"checkpoint={head}", "target=hf", "export.max_drop=9"],
    }
    if at_end:
        commands["evaluate-kept"] = [*commands["evaluate"], "backbone.weights=keep"]
        commands["export-tensors"] = ["+recipe=export", f"checkpoint={head}", "target=hf", "export.check=tensors"]
    for name in shared:
        commands[name].append("mtp.experts=expert_parallel")
    return [(name, [*command, *where, f"output_dir={folder}/{name}"]) for name, command in commands.items()]


def run(folder: Path, commands: list[Job]) -> None:
    """Run commands one after the other; write NAME.code and NAME.RANK.txt into `folder`."""
    number = os.environ.get("RANK", "0")
    for name, arguments in commands:
        with output_in(folder / f"{name}.{number}.txt"):
            code = run_main(*arguments, *SMALLER)
            if torch.distributed.is_initialized():  # a refused command leaves the group to the end of its process
                torch.distributed.destroy_process_group()
        if number == "0":
            (folder / f"{name}.code").write_text(str(code), encoding="utf-8")


def main(path: Path) -> None:
    """Run the groups of commands of a file, each with its folder."""
    torch.set_num_threads(1)
    for folder, commands in json.loads(path.read_text(encoding="utf-8")):
        with patch.dict(os.environ), patch.object(cli, "PATIENCE_SECONDS", 0):  # no launcher ends rank 0
            run(Path(folder), commands)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
