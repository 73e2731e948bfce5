"""`+recipe=compare`: is one head better than another, on the same prompts and the same traces?

python -m mtptrain +recipe=compare checkpoints=[stock,outputs/distill/RUN]
"""

from __future__ import annotations

from string import ascii_uppercase

from rich.console import Console

from mtptrain.config import RunConfig, require
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_heldout_text, of_traces, settings
from mtptrain.evaluation.compare import compare_heads, print_comparison
from mtptrain.evaluation.comparison_result import ComparedHead, Comparison
from mtptrain.evaluation.heads import count_seen, describe_prompts
from mtptrain.evaluation.metrics import by_domain, summarize
from mtptrain.evaluation.report.headline import seen_text
from mtptrain.evaluation.result import SCHEMA
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prepare_traces, replay_head
from mtptrain.run.folder import FolderUse
from mtptrain.run.progress import waiting
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import to_json

PROCESSES = "led"
FOLDER = FolderUse.result


def reads(config: RunConfig) -> Settings:
    """Return the settings that a comparison reads."""
    used = ALWAYS | of_backbone(config) | of_heldout_text(config) | of_traces(config)
    return used | settings("checkpoints", "data.sequence_length", "evaluation.heldout_sequences", "overwrite")


def check(config: RunConfig) -> None:
    """Refuse a comparison of one head, or of more heads than there are letters to name them."""
    require(
        2 <= len(config.compared) <= len(ascii_uppercase),
        "checkpoints",
        config.checkpoints,
        f"compare needs 2 to {len(ascii_uppercase)} of them, e.g. checkpoints=[stock,outputs/distill/RUN]",
    )


def run(session: Session) -> None:
    """Replay every checkpoint on the same traces and compare each with the first."""
    config, folder = session.config, session.folder
    checkpoints = {path: session.checkpoint(path) for path in config.checkpoints if path != "stock"}
    for checkpoint in checkpoints.values():
        checkpoint.head_identity(session.backbone.fingerprint)
    stock = session.stock_head() if "stock" in config.checkpoints else None
    trace_set = prepare_traces(session)
    traces = trace_set.traces
    prompts = [trace.prompt for trace in traces]
    groups = [prompt.group for prompt in prompts]
    names = [f"{letter} ({path})" for letter, path in zip(ascii_uppercase, config.checkpoints, strict=False)]
    heads, replays = [], []
    for name, path in zip(names, config.checkpoints, strict=True):
        head = stock if path == "stock" and stock else session.trained_head(checkpoints[path])
        with waiting(f"replaying {name} on {len(traces)} texts"):
            counts = replay_head(session, head.stack, traces)
        seen = count_seen(head.passages, session.hasher, [prompt.tokens for prompt in prompts])
        if seen is not None and seen.seen:
            folder.print_status(seen_text(name, seen))
        heads.append(
            ComparedHead(
                name=name,
                checkpoint=head.checkpoint,
                mode=head.mode,
                depth=head.stack.depth,
                parameters=head.num_parameters,
                replay={k: summarize(counts[k], groups) for k in counts},
                domains=by_domain(counts[max(counts)], groups, [prompt.domain for prompt in prompts]),
                seen_prompts=seen,
            )
        )
        replays.append(counts)
    comparisons = [
        compare_heads((names[0], name), replays[0], counts, prompts)
        for name, counts in zip(names[1:], replays[1:], strict=True)
    ]
    result = Comparison(
        schema=SCHEMA,
        provenance=folder.provenance,
        backbone=session.describe_backbone(),
        prompts=describe_prompts(trace_set),
        draft_length=config.decoding.draft_length,
        heads=heads,
        comparisons=comparisons,
    )
    write_json(folder.path / "comparison.json", to_json(result))
    for comparison in comparisons:
        print_comparison(comparison, Console())
    folder.print_status(f"wrote {folder.path / 'comparison.json'}")
