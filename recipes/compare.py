"""`+recipe=compare`: is one head better than another, on the same prompts and the same traces?

python -m mtptrain +recipe=compare checkpoints=[stock,outputs/distill/RUN]
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mtptrain.checkpoint import find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.evaluation.compare import compare_heads, print_comparison
from mtptrain.evaluation.comparison_result import ComparedHead, Comparison
from mtptrain.evaluation.metrics import by_domain, summarize
from mtptrain.evaluation.result import SCHEMA
from mtptrain.evaluation.subject import describe_prompts
from mtptrain.provenance import Provenance
from mtptrain.recipes.inputs import (
    check_owner,
    describe_backbone,
    heldout_corpus,
    open_backbone,
    stock_head,
    trained_head,
)
from mtptrain.recipes.traces import prepare_traces, replay_head
from mtptrain.run.typed_json import from_json, to_json
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json


def run(config: RunConfig, run_folder: RunFolder) -> None:
    """Replay every checkpoint on the same traces and compare each with the first."""
    stored = {path: find_checkpoint(Path(path)) for path in config.checkpoints if path != "stock"}
    backbone = open_backbone(config)
    for checkpoint in stored.values():
        check_owner(backbone, checkpoint)
    stock = stock_head(backbone) if "stock" in config.checkpoints else None
    corpus = heldout_corpus(config, backbone)
    trace_set = prepare_traces(config, run_folder, backbone, corpus)
    traces = trace_set.traces
    prompts = [trace.prompt for trace in traces]
    groups = [prompt.group for prompt in prompts]
    names = [f"{letter} ({path})" for letter, path in zip("ABCDEFGHIJ", config.checkpoints, strict=False)]
    heads, replays = [], []
    for name, path in zip(names, config.checkpoints, strict=True):
        head = stock if path == "stock" and stock else trained_head(backbone, stored[path])
        counts = replay_head(config, backbone, head.stack, traces)
        heads.append(
            ComparedHead(
                name=name,
                checkpoint=head.checkpoint,
                mode=head.mode,
                depth=head.stack.depth,
                parameters=head.num_parameters,
                replay={k: summarize(counts[k], groups) for k in counts},
                domains=by_domain(counts[max(counts)], groups, [prompt.domain for prompt in prompts]),
            )
        )
        replays.append(counts)
    comparisons = [
        compare_heads((names[0], name), replays[0], counts, prompts)
        for name, counts in zip(names[1:], replays[1:], strict=True)
    ]
    result = Comparison(
        schema=SCHEMA,
        provenance=from_json(Provenance, run_folder.provenance),
        backbone=describe_backbone(config, backbone, corpus),
        prompts=describe_prompts(trace_set),
        draft_length=config.decoding.draft_length,
        heads=heads,
        comparisons=comparisons,
    )
    write_json(run_folder.path / "comparison.json", to_json(result))
    for comparison in comparisons:
        print_comparison(comparison, Console())
    run_folder.say(f"wrote {run_folder.path / 'comparison.json'}")
