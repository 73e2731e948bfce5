"""Runs of the real decoding loop: their counts, their certificate and samples of their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tokenizers import Tokenizer
from transformers import DeepseekV4ForCausalLM

from mtptrain.certificate.greedy import LoopRun
from mtptrain.certificate.sampled import certify_pass_counts, sampled_run
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded
from mtptrain.evaluation.certificate_result import PassCountTest
from mtptrain.evaluation.head_result import Piece, PieceKind, Sample, Totals
from mtptrain.evaluation.metrics import totals
from mtptrain.evaluation.speedup import BatchRuns
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import ReplayDrafts, draft_traces
from mtptrain.replay.replay import anchor_passes, count_passes
from mtptrain.run.progress import counted
from mtptrain.traces.file import Trace


def loop_totals(runs: list[BatchRuns], head: str, draft_length: int) -> Totals:
    """Return passes, emitted tokens and acceptance length of the real runs of one head."""
    rows = [row for run in runs for row in run.speculative[head, draft_length].rows]
    return totals([count_passes(row.passes, draft_length) for row in rows])


def loop_drafts(
    model: DeepseekV4ForCausalLM, stack: MtpStack, runs: list[BatchRuns], key: tuple[str, int], policy: Policy
) -> list[ReplayDrafts]:
    """Return a head's drafts on the texts that its own loop emitted; `key` is head and K."""
    texts: list[Trace] = []
    for run in runs:
        for trace, row in zip(run.traces, run.speculative[key].rows, strict=True):
            texts.append(replace(trace, tokens=row.tokens, gaps=row.gaps, probabilities=row.probabilities))
    return draft_traces(model, stack, texts, key[1], policy, free_running=policy.min_confidence > 0)


def loop_runs(
    model: DeepseekV4ForCausalLM, stacks: dict[str, MtpStack], runs: list[BatchRuns], policy: Policy
) -> list[LoopRun]:
    """Return every run of a prompt with plain decoding and replay of the same prompt; drafts are greedy."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [(tuple(trace.prompt.tokens), len(run.traces)) for run in runs for trace in run.traces]
    loops = []
    for name, k in counted("certificate: replaying the loops", list(runs[0].speculative)):
        decoded = _rows_and_drafts(model, stacks[name], runs, (name, k), policy)
        for (prompt, batch), (plain, row, drafts) in zip(rows, decoded, strict=True):
            known = policy.min_confidence == 0 or drafts.free_confidence_KN is not None
            at_anchors = anchor_passes(drafts, policy, k) if known else None
            number = numbers.setdefault(prompt, len(numbers))
            margins, is_walked = (drafts.margin_KN, drafts.free_margin_KN), policy.wraps(stacks[name].depth, k)
            loops.append(LoopRun(name, number, k, batch, plain, row, at_anchors, *margins, is_walked))
    return loops


def certify_sampled_runs(
    model: DeepseekV4ForCausalLM, stacks: dict[str, MtpStack], runs: list[BatchRuns], policy: Policy
) -> PassCountTest:
    """Compare the number of passes of loops with sampled drafts with replay."""
    loops = []
    for name, k in counted("certificate: replaying the loops", list(runs[0].speculative)):
        for _, row, drafts in _rows_and_drafts(model, stacks[name], runs, (name, k), policy):
            loops.append(sampled_run(name, k, len(row.passes), drafts, policy))
    return certify_pass_counts(loops)


def _rows_and_drafts(
    model: DeepseekV4ForCausalLM, stack: MtpStack, runs: list[BatchRuns], key: tuple[str, int], policy: Policy
) -> Iterator[tuple[Decoded, Decoded, ReplayDrafts]]:
    """Yield every prompt's plain and speculative text, and the head's drafts on the latter; `key` is head and K."""
    drafts = iter(loop_drafts(model, stack, runs, key, policy))
    for run in runs:
        for plain, row in zip(run.plain[0].rows, run.speculative[key].rows, strict=True):
            yield plain, row, next(drafts)


def sample_texts(
    tokenizer: Tokenizer, runs: list[BatchRuns], head: str, draft_length: int, count: int = 3
) -> list[Sample]:
    """Return some texts that the loop emitted, cut into pieces by the origin of their tokens."""
    rows = [
        (trace, row)
        for run in runs
        for trace, row in zip(run.traces, run.speculative[head, draft_length].rows, strict=True)
    ]
    return [
        Sample(
            prompt=tokenizer.decode(trace.prompt.tokens[-40:], skip_special_tokens=False),
            draft_length=draft_length,
            pieces=text_pieces(tokenizer, row),
        )
        for trace, row in rows[:count]
    ]


def text_pieces(tokenizer: Tokenizer, row: Decoded) -> list[Piece]:
    """Return the text token by token; a rejected draft stands before the verifier's token."""
    kinds: list[tuple[PieceKind, int | None]] = [(PieceKind.bonus, None)]
    for record, rejected in zip(row.passes, row.rejected, strict=True):
        bonus = record.emitted - record.accepted  # 0 if the text ended with a draft
        kinds += [(PieceKind.accepted, None)] * record.accepted + [(PieceKind.bonus, rejected)] * bonus
    pieces: list[Piece] = []
    decoded = ""
    for end, (kind, rejected) in enumerate(kinds, start=1):
        if rejected is not None:
            wrong = tokenizer.decode([*row.tokens[: end - 1], rejected], skip_special_tokens=False)
            pieces.append(Piece(wrong.removeprefix(decoded).replace("\ufffd", ""), PieceKind.rejected))
        text = tokenizer.decode(row.tokens[:end], skip_special_tokens=False)
        if text.endswith("\ufffd"):
            continue  # the bytes of a character are not complete yet
        pieces.append(Piece(text[len(decoded) :], kind))
        decoded = text
    return pieces
