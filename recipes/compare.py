"""`+recipe=compare`: is one head better than another, on the same prompts and the same traces?

python -m mtptrain +recipe=compare checkpoints=[stock,outputs/distill/RUN]
python -m mtptrain +recipe=compare checkpoints=[stock,[SEED0,SEED1,SEED2]]
"""

from __future__ import annotations

from itertools import combinations
from string import ascii_uppercase

from mtptrain.config import RunConfig, require
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_heldout_text, of_traces, settings
from mtptrain.evaluation.compare import CountsByLength, Runs, compare_heads, differing_settings
from mtptrain.evaluation.comparison_result import (
    COMPARISON_FILE,
    COMPARISON_SCHEMA,
    ComparedHead,
    ComparedRun,
    Comparison,
)
from mtptrain.evaluation.head_result import chosen_text
from mtptrain.evaluation.heads import Head, count_chosen, count_seen, describe_policy, describe_prompts
from mtptrain.evaluation.metrics import acceptance_length
from mtptrain.evaluation.report.comparison_page import COMPARISON_PAGE, print_result, write_comparison_page
from mtptrain.evaluation.report.headline import seen_text
from mtptrain.evaluation.runs import runs_by_domain, summarize_runs
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prepare_traces, replay_head
from mtptrain.run.folder import FolderUse
from mtptrain.run.storage import write_json
from mtptrain.run.tables import open_console
from mtptrain.run.typed_json import to_json
from mtptrain.traces.file import Trace
from mtptrain.training.resume import differences

PROCESSES = "led"
FOLDER = FolderUse.result
ONCE = "a setting lists a run once: a copy or another step of it would pass for another seed; train with other seeds"


def reads(config: RunConfig) -> Settings:
    """Return the settings that a comparison reads."""
    used = ALWAYS | of_backbone(config) | of_heldout_text(config) | of_traces(config)
    return used | settings("checkpoints", "data.sequence_length", "evaluation.heldout_sequences", "overwrite")


def check(config: RunConfig) -> None:
    """Refuse a comparison of one setting, of more than there are letters to name them, or of a run with itself."""
    compared = config.compared
    require(
        2 <= len(compared) <= len(ascii_uppercase),
        "checkpoints",
        config.checkpoints,
        f"compare needs 2 to {len(ascii_uppercase)} of them, e.g. checkpoints=[stock,outputs/distill/RUN]",
    )
    for paths in compared:
        require(len(set(paths)) == len(paths), "checkpoints", paths, ONCE)
        require(len(paths) == 1 or "stock" not in paths, "checkpoints", paths, "the stock head is a setting of its own")


def run(session: Session) -> None:
    """Replay every checkpoint on the same traces and compare each setting with the first."""
    config, folder = session.config, session.folder
    for paths in config.compared:
        _check_runs(session, paths)
    trace_set = prepare_traces(session)
    prompts, longest = [trace.prompt for trace in trace_set.traces], config.decoding.draft_length
    measured = [
        _measure(session, f"{letter} ({_shown(paths)})", paths, trace_set.traces)
        for letter, paths in zip(ascii_uppercase, config.compared, strict=False)
    ]
    heads, replays = [head for head, _ in measured], [counts for _, counts in measured]
    comparisons = [
        compare_heads((heads[0].name, head.name), replays[0], counts, prompts)
        for head, counts in zip(heads[1:], replays[1:], strict=True)
    ]
    result = Comparison(
        schema=COMPARISON_SCHEMA,
        provenance=folder.provenance,
        backbone=session.describe_backbone(),
        prompts=describe_prompts(trace_set),
        policy=describe_policy(session.policy, config.decoding.served_as),
        draft_length=longest,
        heads=heads,
        comparisons=comparisons,
        differences=differing_settings([[_settings(session, path) for path in paths] for paths in config.compared]),
    )
    write_json(folder.path / COMPARISON_FILE, to_json(result))
    write_comparison_page(result, folder.path / COMPARISON_PAGE)
    print_result(result, open_console())
    folder.print_status(f"wrote {folder.path / COMPARISON_FILE} and {folder.path / COMPARISON_PAGE}")


def _settings(session: Session, path: str) -> dict[str, object] | None:
    """Return the settings of the training of a checkpoint by name; None for the stock head."""
    if path == "stock":
        return None
    checkpoint = session.checkpoint(path)
    identity = checkpoint.head_identity(session.backbone.fingerprint)
    first = {"+recipe": identity.task, "steps trained": checkpoint.step, "mtp.init": identity.start["init"]}
    return {**first, **identity.settings, "data (digest of its tokens)": identity.data[:12]}


def _shown(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} runs: {', '.join(paths)}"


def _check_runs(session: Session, paths: list[str]) -> None:
    """Check the checkpoints of a setting against the backbone and each other.

    Raises:
        UserError: a head belongs to another backbone, two heads come from one training, or they differ in their form.
    """
    checkpoints = [session.checkpoint(path) for path in paths if path != "stock"]
    identities = [one.head_identity(session.backbone.fingerprint) for one in checkpoints]
    are_alike = any(not differences(one, other) for one, other in combinations(identities, 2))
    require(not are_alike, "checkpoints", paths, ONCE)
    forms = sorted({f"mtp.mode={one.mode.value} with mtp.depth={one.depth}" for one in identities})
    rule = f"the runs of one setting differ in more than their seed: {' and '.join(forms)}; compare them apart"
    require(len(forms) < 2, "checkpoints", paths, rule)
    changed = {change.name for one in identities[1:] for change in differences(identities[0], one)} - {"seed"}
    if changed:
        session.folder.print_status(f"the runs {', '.join(paths)} also differ in {', '.join(sorted(changed))}")


def _measure(session: Session, name: str, paths: list[str], traces: list[Trace]) -> tuple[ComparedHead, Runs]:
    """Return the entry of a setting in comparison.json, and the counts of its runs."""
    groups, domains = [trace.prompt.group for trace in traces], [trace.prompt.domain for trace in traces]
    runs, replays = [], []
    for path in paths:
        head = session.head(path)
        counts = replay_head(session, head.stack, traces)
        runs.append(_describe_run(session, head, counts, traces))
        replays.append(counts)
    longest = session.config.decoding.draft_length
    entry = ComparedHead(
        name=name,
        mode=head.mode,
        depth=head.stack.depth,
        parameters=head.num_parameters,
        runs=runs,
        replay={k: summarize_runs([counts[k] for counts in replays], groups) for k in replays[0]},
        domains=runs_by_domain([counts[longest] for counts in replays], groups, domains),
    )
    return entry, replays


def _describe_run(session: Session, head: Head, counts: CountsByLength, traces: list[Trace]) -> ComparedRun:
    """Return the entry of a run, and say if its head was trained or chosen on some of the prompts."""
    prompts = [trace.prompt.tokens for trace in traces]
    run = ComparedRun(
        checkpoint=head.checkpoint,
        acceptance_length={k: acceptance_length(counts[k]) for k in counts},
        seen_prompts=count_seen(head.passages, session.hasher, prompts),
        chosen_on=count_chosen(head.selection, prompts),
    )
    if run.seen_prompts is not None and run.seen_prompts.seen:
        session.folder.print_status(seen_text(f"the head {head.checkpoint}", run.seen_prompts))
    chosen = chosen_text(head.checkpoint, run.chosen_on)
    if chosen is not None:
        session.folder.print_status(chosen)
    return run
