"""`+recipe=evaluate`: measure heads: acceptance, the certificate, speed on the clock.

python -m mtptrain +recipe=evaluate checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mtptrain.checkpoint import find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.decoding.policy import GREEDY
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
from mtptrain.evaluation.report.tables import print_summary
from mtptrain.evaluation.result import Evaluation
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
from mtptrain.recipes.publish import publish
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import check_prompts, prepare_traces
from mtptrain.run.typed_json import from_json
from mtptrain.storage import write_json

SCHEMA = 2
STEP_REPETITIONS = 20
GREEDY_PROMPTS = 2  # decoded greedily for the certificate where the run samples


def run_loops(session: Session, heads: list[Head], traces: list[Trace]) -> dict[int, list[BatchRuns]]:
    """Really decode some prompts with every head and K, by batch size."""
    config, model = session.config, session.backbone.model
    sizes, lengths = config.evaluation.batch_sizes, list(range(1, config.decoding.draft_length + 1))
    stacks = {head.name: head.stack for head in heads}
    batches = {size: cut_batches(traces, size, config.evaluation.timed_prompts) for size in sizes}
    found: dict[int, list[BatchRuns]] = {}
    done = 0
    with Progress("decoding batches", sum(map(len, batches.values())), unit="batches") as progress:
        for size in sizes:

            def report(number: int, note: str, before: int = done) -> None:
                progress.update(before + number, note, 1)

            found[size] = run_interleaved(
                model, stacks, batches[size], lengths, session.limits, session.policy, config.seed, report
            )
            done += len(batches[size])
    return found


def make_certificate(
    session: Session, heads: list[Head], traces: list[Trace], runs: dict[int, list[BatchRuns]]
) -> dict[str, Any]:
    """Everything that must hold before a figure counts, and whether all of it does."""
    model, policy, longest = session.backbone.model, session.policy, session.config.decoding.draft_length
    stacks = {head.name: head.stack for head in heads}
    parts = certify_runs(model, stacks, [run for of_size in runs.values() for run in of_size], policy)
    if not policy.is_greedy:
        few = [[trace] for trace in traces[:GREEDY_PROMPTS]]
        seed = session.config.seed
        greedy = run_interleaved(model, stacks, few, [longest], session.limits, GREEDY, seed, lambda *_: None)
        parts |= certify_runs(model, stacks, greedy, GREEDY)
    controls: dict[str, Any] = {"all_accept": all_accept_control(model, traces[0].prompt.tokens, longest)}
    controls |= {f"shifted_target_{name}": shifted_target_control(model, stacks[name], traces) for name in stacks}
    parts |= {"sampler": sampler_certificate()}
    parts |= {"controls": {"passed": all(one["passed"] for one in controls.values()), **controls}}
    return {"passed": all(part["passed"] for part in parts.values()), **parts}


def measure_times(session: Session, heads: list[Head], runs: list[BatchRuns]) -> dict[str, Any]:
    """Times of the steps of each head on the prompts of a batch, and the speed-ups that they predict for the runs."""
    traces, longest = runs[0].traces, session.config.decoding.draft_length
    shortest = min(len(trace.prompt.tokens) for trace in traces)
    prompts = [trace.prompt.tokens[:shortest] for trace in traces]
    found = {}
    for head in heads:
        lengths = {k: batch_length(runs, head.name, k) for k in range(1, longest + 1)}
        times = measure_steps(session.backbone.model, head.stack, prompts, longest, STEP_REPETITIONS)
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


def evaluate_heads(session: Session, heads: list[Head]) -> Evaluation:
    """Measure heads on one backbone and write evaluation.json, report.html and the table."""
    config, backbone, policy = session.config, session.backbone, session.policy
    longest, row_length = config.decoding.draft_length, session.piece_length
    trace_set = prepare_traces(session)
    traces = trace_set.traces
    runs = run_loops(session, heads, traces)
    first = min(runs)
    rows = config.evaluation.heldout_sequences
    entries, replays = [], {}
    for head in heads:
        drafts = draft_traces(backbone.model, head.stack, traces, longest, policy, free_running=True)
        replays[head.name] = replay_all(drafts, policy)
        entries.append(
            {
                **head.describe(),
                "teacher_forced": teacher_forced(
                    backbone.model, head.stack, session.heldout_corpus, row_length, rows, longest
                ),
                **describe_acceptance(traces, drafts, replays[head.name], policy, backbone.tokenizer),
                "loop": {str(k): loop_totals(runs[first], head.name, k) for k in replays[head.name]},
                "samples": sample_texts(backbone.tokenizer, runs[first], head.name, longest),
            }
        )
    gain, gain_by_domain = compare_with_stock(replays, traces)
    evaluation = {
        "schema": SCHEMA,
        "provenance": session.folder.provenance,
        "backbone": session.describe_backbone(),
        "prompts": trace_set.describe(),
        "policy": policy.describe(),
        "draft_length": longest,
        "heads": entries,
        "gain": gain,
        "gain_by_domain": gain_by_domain,
        "certificate": make_certificate(session, heads, traces, runs),
        "speedup": {
            str(size): {
                head.name: {str(k): summarize_speed(found, head.name, k) for k in replays[head.name]} for head in heads
            }
            for size, found in runs.items()
        },
        "steps": {str(size): measure_times(session, heads, found) for size, found in runs.items()},
        "plain_tokens_per_second": {
            str(size): tokens_per_second([one for run in found for one in run.plain]) for size, found in runs.items()
        },
    }
    folder = session.folder.path
    write_json(folder / "evaluation.json", evaluation)
    result = _typed(evaluation)
    write_report(result, folder / "report.html")
    print_summary(result, Console())
    session.folder.say(f"wrote {folder / 'evaluation.json'} and {folder / 'report.html'}")
    return result


def _typed(evaluation: dict[str, Any]) -> Evaluation:
    """Goes away with the parts that build an `Evaluation`."""
    certificate = dict(evaluation["certificate"])
    controls = dict(certificate["controls"])
    prefix = "shifted_target_"
    names = [name for name in controls if name.startswith(prefix)]
    controls["shifted_target"] = {name.removeprefix(prefix): controls.pop(name) for name in names}
    certificate |= {"controls": controls, "pass_count_test": certificate.pop("replay_law", None)}
    return from_json(Evaluation, json.loads(json.dumps(evaluation | {"certificate": certificate})))


def check(config: RunConfig) -> None:
    """Refuse an evaluation without a head; called before anything is opened."""
    if config.checkpoint is None:
        raise UserError("checkpoint=null: evaluate needs a head; give a run folder, a step_* folder, or `stock`")


def run(session: Session) -> None:
    """Measure `checkpoint`, beside the stock head unless it is the one asked for."""
    setting = str(session.config.checkpoint)
    checkpoint = None if setting == "stock" else find_checkpoint(Path(setting))
    check_prompts(session)
    heads = []
    if checkpoint is None or (session.config.evaluation.include_stock and has_stock(session.backbone)):
        heads.append(session.stock_head())
    if checkpoint is not None:
        heads.append(session.trained_head(checkpoint))
    with session.folder.open_mirror() as mirror:
        publish(mirror, session.folder, evaluate_heads(session, heads))
