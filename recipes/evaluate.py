"""`+recipe=evaluate`: measure heads: acceptance, the certificate, speed on the clock.

python -m mtptrain +recipe=evaluate checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from mtptrain.backbone.load import Backbone
from mtptrain.checkpoint import find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.decoding.policy import Policy, decoding_policy
from mtptrain.decoding.records import Decoded, VerifyPass
from mtptrain.errors import UserError
from mtptrain.evaluation.certify import LoopRun, certify
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.counts import count_passes
from mtptrain.evaluation.drafts import draft_traces
from mtptrain.evaluation.heads import Head, teacher_forced
from mtptrain.evaluation.metrics import paired_gain, summarize, totals
from mtptrain.evaluation.replay import replay_all, replay_passes
from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.table import print_summary
from mtptrain.evaluation.speedup import run_interleaved, summarize_speed
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.initial import has_stock
from mtptrain.mtp.stack import MtpStack
from mtptrain.progress import Progress
from mtptrain.recipes.inputs import (
    describe_backbone,
    heldout_corpus,
    open_backbone,
    stock_head,
    trained_head,
)
from mtptrain.recipes.traces import decoding_limits, prepare_traces
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json

SCHEMA = 1


def replay_head(config: RunConfig, backbone: Backbone, stack: MtpStack, traces: list[Trace]) -> Replayed:
    """Counts of every trace for every draft length, from one rollout."""
    policy = decoding_policy(config.decoding)
    stops = policy.stop_below > 0
    drafts = draft_traces(backbone.model, stack, traces, config.decoding.draft_length, policy, free_running=stops)
    return replay_all(drafts, policy)


def sample_pieces(tokenizer: Tokenizer, trace: Trace, passes: list[VerifyPass]) -> list[dict[str, str]]:
    """A continuation cut into pieces by where its tokens came from."""
    kinds = ["bonus"]
    for record in passes:
        kinds += ["accepted"] * record.accepted + ["bonus"] * (record.emitted - record.accepted)
    pieces: list[dict[str, str]] = []
    done = ""
    for end, kind in enumerate(kinds, start=1):
        text = tokenizer.decode(trace.tokens[:end], skip_special_tokens=False)
        if text.endswith("\ufffd"):
            continue  # the bytes of a character are not complete yet
        pieces.append({"text": text[len(done) :], "kind": kind})
        done = text
    return pieces


def measure_loop(
    config: RunConfig, backbone: Backbone, heads: list[Head], traces: list[Trace]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], float]:
    """Really decode some prompts: loop counts by head, certificate, speed-ups by head, plain tokens a second."""
    lengths = list(range(1, config.decoding.draft_length + 1))
    limits = decoding_limits(config, backbone)
    stacks = {head.name: head.stack for head in heads}
    with Progress("decoding prompts", len(traces), unit="prompts") as progress:
        plain, runs = run_interleaved(
            backbone.model, stacks, traces, lengths, limits, lambda done, note: progress.update(done, note, 1)
        )
    loop: dict[str, Any] = {name: {} for name in stacks}
    speed: dict[str, Any] = {name: {} for name in stacks}
    checks: list[LoopRun] = []
    for (name, k), records in runs.items():
        texts = [
            replace(trace, tokens=record.tokens, gaps=record.gaps)
            for trace, record in zip(traces, records, strict=True)
        ]
        policy = Policy()
        drafts = draft_traces(backbone.model, stacks[name], texts, k, policy)
        for number, (record, one) in enumerate(zip(records, drafts, strict=True)):
            checks.append(LoopRun(name, number, k, plain[number][0], record, replay_passes(one, policy, k)))
        loop[name][str(k)] = totals([count_passes(record.passes, k) for record in records])
        speed[name][str(k)] = summarize_speed(plain, records)
    certificate = certify(checks, str(backbone.model.lm_head.weight.dtype).removeprefix("torch."))
    return loop, certificate, speed, _plain_rate(plain)


def _plain_rate(plain: list[list[Decoded]]) -> float:
    """Tokens a second of plain decoding."""
    runs = [run for pair in plain for run in pair]
    return sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs)


def evaluate_heads(config: RunConfig, run_folder: RunFolder, backbone: Backbone, heads: list[Head]) -> dict[str, Any]:
    """Measure heads on one backbone and write evaluation.json, report.html and the table.

    Returns:
        The content of evaluation.json; docs/evaluation.md describes it.
    """
    corpus = heldout_corpus(config, backbone)
    row_length, longest = config.data.sequence_length, config.decoding.draft_length
    trace_set = prepare_traces(config, run_folder, backbone, corpus)
    traces = trace_set.traces
    replayed = {head.name: replay_head(config, backbone, head.stack, traces) for head in heads}
    timed = traces[:: max(1, len(traces) // config.evaluation.timed_prompts)][: config.evaluation.timed_prompts]
    loop, certificate, speed, plain_rate = measure_loop(config, backbone, heads, timed)
    rows = config.evaluation.heldout_sequences
    entries = []
    groups = [trace.prompt.group for trace in traces]
    shown = traces[:3]
    for head in heads:
        counts = replayed[head.name]
        drafts = draft_traces(backbone.model, head.stack, shown, longest, Policy())
        entries.append(
            {
                **head.describe(),
                "teacher_forced": teacher_forced(backbone.model, head.stack, corpus, row_length, rows, longest),
                "replay": {str(k): summarize(counts[k], groups) for k in counts},
                "loop": loop[head.name],
                "samples": [
                    {
                        "prompt": backbone.tokenizer.decode(trace.prompt.tokens[-40:]),
                        "draft_length": longest,
                        "pieces": sample_pieces(backbone.tokenizer, trace, replay_passes(one, Policy(), longest)),
                    }
                    for trace, one in zip(shown, drafts, strict=True)
                ],
            }
        )
    gain = None
    if {"stock", "trained"} <= set(replayed):
        gain = {str(k): paired_gain(replayed["stock"][k], replayed["trained"][k], groups) for k in replayed["stock"]}
    evaluation = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "backbone": describe_backbone(config, backbone, corpus),
        "prompts": trace_set.describe(),
        "draft_length": longest,
        "heads": entries,
        "gain": gain,
        "certificate": certificate,
        "speedup": speed,
        "plain_tokens_per_second": plain_rate,
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
    evaluate_heads(config, run_folder, backbone, heads)
