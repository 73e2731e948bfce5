"""`+recipe=evaluate`: measure heads: acceptance, the certificate, speed on the clock.

python -m mtptrain +recipe=evaluate checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from mtptrain.backbone.load import Backbone
from mtptrain.checkpoint import find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.decoding.policy import GREEDY, decoding_policy
from mtptrain.errors import UserError
from mtptrain.evaluation.acceptance import describe_acceptance
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.controls import all_accept_control, shifted_target_control
from mtptrain.evaluation.drafts import draft_traces
from mtptrain.evaluation.heads import Head, teacher_forced
from mtptrain.evaluation.loop import certify_runs, loop_totals, sample_texts
from mtptrain.evaluation.metrics import domain_rows, paired_gain
from mtptrain.evaluation.replay import replay_all
from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.table import print_summary
from mtptrain.evaluation.sampler_check import sampler_certificate
from mtptrain.evaluation.speedup import (
    BatchRuns,
    batch_length,
    cut_batches,
    run_interleaved,
    summarize_speed,
    tokens_per_second,
)
from mtptrain.evaluation.steptime import describe_times, measure_steps
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.initial import has_stock
from mtptrain.progress import Progress
from mtptrain.recipes.inputs import (
    describe_backbone,
    heldout_corpus,
    open_backbone,
    piece_length,
    stock_head,
    trained_head,
)
from mtptrain.recipes.publish import publish
from mtptrain.recipes.traces import decoding_limits, prepare_traces
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json

SCHEMA = 2
STEP_REPETITIONS = 20
GREEDY_PROMPTS = 2  # decoded greedily for the certificate where the run samples


def run_loops(
    config: RunConfig, backbone: Backbone, heads: list[Head], traces: list[Trace]
) -> dict[int, list[BatchRuns]]:
    """Really decode some prompts with every head and K, by batch size."""
    sizes, policy = config.evaluation.batch_sizes, decoding_policy(config.decoding)
    limits, lengths = decoding_limits(config, backbone), list(range(1, config.decoding.draft_length + 1))
    stacks = {head.name: head.stack for head in heads}
    batches = {size: cut_batches(traces, size, config.evaluation.timed_prompts) for size in sizes}
    found: dict[int, list[BatchRuns]] = {}
    done = 0
    with Progress("decoding batches", sum(map(len, batches.values())), unit="batches") as progress:
        for size in sizes:

            def report(number: int, note: str, before: int = done) -> None:
                progress.update(before + number, note, 1)

            found[size] = run_interleaved(
                backbone.model, stacks, batches[size], lengths, limits, policy, config.seed, report
            )
            done += len(batches[size])
    return found


def make_certificate(
    config: RunConfig, backbone: Backbone, heads: list[Head], traces: list[Trace], runs: dict[int, list[BatchRuns]]
) -> dict[str, Any]:
    """Everything that must hold before a figure counts, and whether all of it does."""
    model, policy, longest = backbone.model, decoding_policy(config.decoding), config.decoding.draft_length
    stacks = {head.name: head.stack for head in heads}
    parts = certify_runs(model, stacks, [run for of_size in runs.values() for run in of_size], policy)
    if not policy.is_greedy:
        few = [[trace] for trace in traces[:GREEDY_PROMPTS]]
        limits = decoding_limits(config, backbone)
        greedy = run_interleaved(model, stacks, few, [longest], limits, GREEDY, config.seed, lambda *_: None)
        parts |= certify_runs(model, stacks, greedy, GREEDY)
    controls: dict[str, Any] = {"all_accept": all_accept_control(model, traces[0].prompt.tokens, longest)}
    controls |= {f"shifted_target_{name}": shifted_target_control(model, stacks[name], traces) for name in stacks}
    parts |= {"sampler": sampler_certificate()}
    parts |= {"controls": {"passed": all(one["passed"] for one in controls.values()), **controls}}
    return {"passed": all(part["passed"] for part in parts.values()), **parts}


def measure_times(backbone: Backbone, heads: list[Head], runs: list[BatchRuns], draft_length: int) -> dict[str, Any]:
    """Times of the steps of each head on the prompts of a batch, and the speed-ups that they predict for the runs."""
    traces = runs[0].traces
    shortest = min(len(trace.prompt.tokens) for trace in traces)
    prompts = [trace.prompt.tokens[:shortest] for trace in traces]
    found = {}
    for head in heads:
        lengths = {k: batch_length(runs, head.name, k) for k in range(1, draft_length + 1)}
        times = measure_steps(backbone.model, head.stack, prompts, draft_length, STEP_REPETITIONS)
        found[head.name] = describe_times(times, lengths)
    return found


def compare_with_stock(
    replays: dict[str, Replayed], traces: list[Trace]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Gain of the trained head over the stock head by K, and by domain at the longest K; None without both."""
    if not {"stock", "trained"} <= set(replays):
        return None, None
    stock, trained = replays["stock"], replays["trained"]
    groups, longest = [trace.prompt.group for trace in traces], max(stock)
    gain = {str(k): paired_gain(stock[k], trained[k], groups) for k in stock}
    by_domain = {}
    for domain, rows in domain_rows([trace.prompt.domain for trace in traces]).items():
        base, other = ([counts[longest][i] for i in rows] for counts in (stock, trained))
        by_domain[domain] = paired_gain(base, other, [groups[i] for i in rows])
    return gain, by_domain


def evaluate_heads(config: RunConfig, run_folder: RunFolder, backbone: Backbone, heads: list[Head]) -> dict[str, Any]:
    """Measure heads on one backbone and write evaluation.json, report.html and the table.

    Returns:
        The content of evaluation.json; docs/evaluation.md describes it.
    """
    corpus, policy = heldout_corpus(config, backbone), decoding_policy(config.decoding)
    longest, row_length = config.decoding.draft_length, piece_length(config, backbone.config)
    trace_set = prepare_traces(config, run_folder, backbone, corpus)
    traces = trace_set.traces
    runs = run_loops(config, backbone, heads, traces)
    first = min(runs)
    rows = config.evaluation.heldout_sequences
    entries, replays = [], {}
    for head in heads:
        drafts = draft_traces(backbone.model, head.stack, traces, longest, policy, free_running=True)
        replays[head.name] = replay_all(drafts, policy)
        entries.append(
            {
                **head.describe(),
                "teacher_forced": teacher_forced(backbone.model, head.stack, corpus, row_length, rows, longest),
                **describe_acceptance(traces, drafts, replays[head.name], policy, backbone.tokenizer),
                "loop": {str(k): loop_totals(runs[first], head.name, k) for k in replays[head.name]},
                "samples": sample_texts(backbone.tokenizer, runs[first], head.name, longest),
            }
        )
    gain, gain_by_domain = compare_with_stock(replays, traces)
    evaluation = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "backbone": describe_backbone(config, backbone, corpus),
        "prompts": trace_set.describe(),
        "policy": policy.describe(),
        "draft_length": longest,
        "heads": entries,
        "gain": gain,
        "gain_by_domain": gain_by_domain,
        "certificate": make_certificate(config, backbone, heads, traces, runs),
        "speedup": {
            str(size): {
                head.name: {str(k): summarize_speed(found, head.name, k) for k in replays[head.name]} for head in heads
            }
            for size, found in runs.items()
        },
        "steps": {str(size): measure_times(backbone, heads, found, longest) for size, found in runs.items()},
        "plain_tokens_per_second": {
            str(size): tokens_per_second([one for run in found for one in run.plain]) for size, found in runs.items()
        },
    }
    write_json(run_folder.path / "evaluation.json", evaluation)
    write_report(evaluation, run_folder.path / "report.html")
    print_summary(evaluation, Console())
    run_folder.say(f"wrote {run_folder.path / 'evaluation.json'} and {run_folder.path / 'report.html'}")
    return evaluation


def run(config: RunConfig, run_folder: RunFolder) -> None:
    """Measure `checkpoint`, beside the stock head unless it is the one asked for."""
    if config.checkpoint is None:
        raise UserError("checkpoint=null: evaluate needs a head; give a run folder, a step_* folder, or `stock`")
    checkpoint = None if config.checkpoint == "stock" else find_checkpoint(Path(config.checkpoint))
    backbone = open_backbone(config)
    heads = []
    if checkpoint is None or (config.evaluation.include_stock and has_stock(backbone)):
        heads.append(stock_head(backbone))
    if checkpoint is not None:
        heads.append(trained_head(backbone, checkpoint))
    with run_folder.open_trackers() as trackers:
        publish(trackers, run_folder, evaluate_heads(config, run_folder, backbone, heads))
