"""`+recipe=evaluate`: measure heads: acceptance, the certificate, speed on the clock.

python -m mtptrain +recipe=evaluate checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.checkpoint import Checkpoint, find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.data.splits import heldout_documents
from mtptrain.data.tokens import TokenizedCorpus, cache_folder, tokenize_corpus
from mtptrain.decoding.records import Decoded, VerifyPass
from mtptrain.distributed import bound_threads, choose_device, choose_dtype
from mtptrain.errors import UserError
from mtptrain.evaluation.certify import LoopRun, certify
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.heads import Head, teacher_forced
from mtptrain.evaluation.metrics import paired_gain, summarize, totals
from mtptrain.evaluation.replay import draft_hits, replay_passes
from mtptrain.evaluation.report import write_report
from mtptrain.evaluation.speedup import run_interleaved, summarize_speed
from mtptrain.evaluation.table import print_summary
from mtptrain.evaluation.trace import Trace, heldout_prompts, record_traces
from mtptrain.losses.next_token import bits_per_byte
from mtptrain.mtp.initial import mtp_tensors, place, stock_tensors
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.progress import Progress
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json

SCHEMA = 1


def open_backbone(config: RunConfig) -> Backbone:
    """The frozen backbone on the run's device, in its arithmetic, with torch's threads bounded."""
    device = choose_device(config.device)
    backbone = load_backbone(config.backbone, device, choose_dtype(config.precision, device))
    bound_threads(config.threads, backbone.config.hidden_size)
    check_window(config, backbone)
    return backbone


def check_window(config: RunConfig, backbone: Backbone) -> None:
    """A draft must fit in the sliding window."""
    window, longest = backbone.config.sliding_window, max(config.mtp.num_steps, config.decoding.draft_length)
    if longest >= window:
        raise UserError(
            f"mtp.steps={config.mtp.num_steps}, decoding.draft_length={config.decoding.draft_length}: a draft must be "
            f"shorter than the backbone's sliding window of {window} tokens"
        )


def has_stock(backbone: Backbone) -> bool:
    """Whether the backbone came with a head."""
    return bool(mtp_tensors(backbone.folder))


def stock_head(backbone: Backbone) -> Head:
    """The head that came with the backbone."""
    tensors = stock_tensors(backbone.folder)
    depth = len({name.split(".")[1] for name in tensors})
    stack = stack_from_tensors(backbone.config, depth, tensors, str(backbone.folder))
    return Head("stock", "stock", "shared" if depth == 1 else "stacked", place(stack, backbone).eval())


def trained_head(backbone: Backbone, checkpoint: Checkpoint) -> Head:
    """The head of a checkpoint.

    Raises:
        UserError: it holds no head, or one that was trained on another backbone.
    """
    owner = checkpoint.owner
    if owner.get("task") == "backbone":
        raise UserError(
            f"checkpoint={checkpoint.folder}: holds a backbone, not a head; for the head that was trained with it set "
            "checkpoint=stock and backbone.path to the run's folder `backbone`"
        )
    if owner.get("backbone") != backbone.fingerprint:
        raise UserError(
            f"checkpoint={checkpoint.folder}: was trained on the backbone {str(owner.get('backbone'))[:12]} and this "
            f"one is {backbone.fingerprint[:12]}; set backbone.path to the backbone it belongs to"
        )
    stack = stack_from_tensors(backbone.config, owner["depth"], checkpoint.tensors(), str(checkpoint.folder))
    return Head("trained", str(checkpoint.folder), owner["mode"], place(stack, backbone).eval())


def heldout_corpus(config: RunConfig, backbone: Backbone) -> TokenizedCorpus:
    """The held-out documents as tokens of the backbone's tokenizer."""
    cache = cache_folder(config.data.cache_dir)
    return tokenize_corpus(heldout_documents(config.data), backbone.tokenizer, backbone.marks, cache)


def check_prompts(config: RunConfig, backbone: Backbone) -> None:
    """Raise a `UserError` unless the held-out text has the prompts that an evaluation needs."""
    heldout_prompts(heldout_corpus(config, backbone), config.evaluation.num_prompts, config.evaluation.prompt_tokens)


def stop_token(backbone: Backbone) -> int | None:
    """The token that ends a text."""
    return next(iter(backbone.marks[1]), None)


def prepare_traces(
    config: RunConfig, run_folder: RunFolder, backbone: Backbone, corpus: TokenizedCorpus
) -> list[Trace]:
    """Prompts from held-out text, continued greedily by the backbone."""
    prompts = heldout_prompts(corpus, config.evaluation.num_prompts, config.evaluation.prompt_tokens)
    run_folder.record()
    run_folder.say(f"continuing {len(prompts)} held-out prompts with the backbone")
    return record_traces(backbone.model, prompts, config.decoding.max_new_tokens, stop_token(backbone))


def describe_backbone(config: RunConfig, backbone: Backbone, corpus: TokenizedCorpus) -> dict[str, Any]:
    """The backbone's entry in evaluation.json, with its loss on held-out text."""
    rows = config.evaluation.heldout_sequences
    nats, bits = bits_per_byte(backbone.model, corpus, config.data.sequence_length, rows)
    return {
        "name": config.backbone.name,
        "fingerprint": backbone.fingerprint,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "heldout_nats_per_token": nats,
        "heldout_bits_per_byte": bits,
    }


def replay_head(config: RunConfig, backbone: Backbone, stack: MtpStack, traces: list[Trace]) -> Replayed:
    """Passes of every trace for every draft length, from one rollout."""
    longest = config.decoding.draft_length
    hits = draft_hits(backbone.model, stack, traces, longest)
    return {
        k: [replay_passes(hit_KS, trace, k) for hit_KS, trace in zip(hits, traces, strict=True)]
        for k in range(1, longest + 1)
    }


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
    limits = (config.decoding.max_new_tokens, stop_token(backbone))
    stacks = {head.name: head.stack for head in heads}
    with Progress("decoding prompts", len(traces), unit="prompts") as progress:
        plain, runs = run_interleaved(
            backbone.model, stacks, traces, lengths, limits, lambda done, note: progress.update(done, note, 1)
        )
    loop: dict[str, Any] = {name: {} for name in stacks}
    speed: dict[str, Any] = {name: {} for name in stacks}
    checks: list[LoopRun] = []
    for (name, k), records in runs.items():
        texts = [Trace(trace.prompt, record.tokens, record.gaps) for trace, record in zip(traces, records, strict=True)]
        hits = draft_hits(backbone.model, stacks[name], texts, k)
        for number, (record, text, hit_KS) in enumerate(zip(records, texts, hits, strict=True)):
            checks.append(LoopRun(name, number, k, plain[number][0], record, replay_passes(hit_KS, text, k)))
        passes, emitted = totals([one for record in records for one in record.passes])
        loop[name][str(k)] = {"acceptance_length": emitted / passes, "passes": passes, "emitted": emitted}
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
    traces = prepare_traces(config, run_folder, backbone, corpus)
    replayed = {head.name: replay_head(config, backbone, head.stack, traces) for head in heads}
    timed = traces[:: max(1, len(traces) // config.evaluation.timed_prompts)][: config.evaluation.timed_prompts]
    loop, certificate, speed, plain_rate = measure_loop(config, backbone, heads, timed)
    rows = config.evaluation.heldout_sequences
    entries = []
    for head in heads:
        passes = replayed[head.name]
        entries.append(
            {
                **head.describe(),
                "teacher_forced": teacher_forced(backbone.model, head.stack, corpus, row_length, rows, longest),
                "replay": {str(k): summarize(passes[k], k) for k in passes},
                "loop": loop[head.name],
                "samples": [
                    {
                        "prompt": backbone.tokenizer.decode(traces[i].prompt[-40:]),
                        "draft_length": longest,
                        "pieces": sample_pieces(backbone.tokenizer, traces[i], passes[longest][i]),
                    }
                    for i in range(min(3, len(traces)))
                ],
            }
        )
    gain = None
    if {"stock", "trained"} <= set(replayed):
        gain = {str(k): paired_gain(replayed["stock"][k], replayed["trained"][k]) for k in replayed["stock"]}
    evaluation = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "backbone": describe_backbone(config, backbone, corpus),
        "prompts": {
            "source": "heldout",
            "count": len(traces),
            "prompt_tokens": config.evaluation.prompt_tokens,
            "new_tokens": config.decoding.max_new_tokens,
        },
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
