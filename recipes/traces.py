"""The traces that a run measures heads on, read from disk or written by the backbone, and their replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mtptrain.config import HELDOUT, ExportTarget, ServedAs
from mtptrain.data.passages import Passages
from mtptrain.errors import UserError
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.heads import count_seen
from mtptrain.export.servers import SERVERS
from mtptrain.mtp.numerics import SERVED
from mtptrain.mtp.stack import MtpStack
from mtptrain.recipes.session import Session
from mtptrain.replay.replay import replay_lengths, replay_other_drafts
from mtptrain.run.progress import Progress
from mtptrain.traces.conversation import answer_text, record_conversations
from mtptrain.traces.file import (
    TRACES_FILE,
    Trace,
    TraceHeader,
    TraceSet,
    check_trace_set,
    read_trace_set,
    record_traces,
    write_trace_set,
)
from mtptrain.traces.prompts import (
    Conversation,
    Prompt,
    PromptSource,
    Source,
    encode_prompt_row,
    independent_groups,
    read_prompt_rows,
    slice_conversations,
    spread_prompt_rows,
)


def check_room(where: str, tokens: list[int], room: int) -> None:
    """Refuse a prompt of more tokens than there is room for; `where` begins the error."""
    if len(tokens) > room:
        raise UserError(
            f"{where}: the prompt has {len(tokens)} tokens and the backbone's context has room for {room} besides "
            "the emitted and drafted tokens; shorten it, or lower decoding.max_new_tokens"
        )


def prompt_row_conversations(
    session: Session, prompt_sources: list[PromptSource], count: int
) -> tuple[list[tuple[str, Conversation]], list[Source]]:
    """Return at most `count` prompt rows as conversations, evenly spread, with file and line; and their sources."""
    source, chat = session.source, session.chat
    conversations: list[tuple[str, Conversation]] = []
    sources = []
    for origin, rows in zip(prompt_sources, spread_prompt_rows(prompt_sources, count), strict=True):
        for row in rows:
            conversation = encode_prompt_row(row, len(conversations), source.tokenizer, source.bos_eos[0], chat)
            conversations.append((row.where, conversation))
        sources.append(Source(origin.name, origin.sha256, len(origin.prompt_rows), len(rows)))
    return conversations, sources


def open_prompts(session: Session, count: int) -> tuple[list[Conversation], list[Source]]:
    """Return at most `count` prompts or conversations of `prompts`, evenly spread, and their sources.

    Raises:
        UserError: there are no prompts, or one cannot be read, is empty or does not fit in the context.
    """
    config, room = session.config, session.prompt_room
    if config.prompts == [HELDOUT]:
        conversations, source = slice_conversations(session.heldout_corpus, count, config.evaluation.prompt_tokens)
        check_room(f"evaluation.prompt_tokens={config.evaluation.prompt_tokens}", conversations[0].prompt.tokens, room)
        return conversations, [source]
    named, sources = prompt_row_conversations(session, read_prompt_rows(config.prompts), count)
    for where, conversation in named:
        check_room(where, conversation.prompt.tokens, room)
    return [conversation for _, conversation in named], sources


def _header(session: Session, backbone: str, sources: list[Source], dropped: int) -> TraceHeader:
    policy, limits, chat = session.policy, session.limits, session.chat
    return TraceHeader(
        backbone=backbone,
        dtype=session.dtype_name,
        temperature=policy.temperature,
        top_k=policy.top_k,
        top_p=policy.top_p,
        max_new_tokens=limits.max_new_tokens,
        stop=sorted(limits.stop),
        seed=session.config.seed,
        chat_template=chat.sha256 if chat else None,
        sources=sources,
        dropped=dropped,
        min_p=policy.min_p,
        repetition_penalty=policy.penalties.repetition,
        frequency_penalty=policy.penalties.frequency,
        presence_penalty=policy.penalties.presence,
        stop_strings=list(limits.strings.texts) if limits.strings else [],
    )


def kept_traces(session: Session, path: Path) -> TraceSet:
    """Return the traces of a file; refuse those of another backbone, policy or limits."""
    traces = read_trace_set(path)
    check_trace_set(path, traces.header, _header(session, session.fingerprint, [], 0))
    _check_trace_rooms(session, traces)
    return traces


def _check_trace_rooms(session: Session, traces: TraceSet) -> None:
    where = f"evaluation.traces={session.config.evaluation.traces}"
    size, ids = int(session.source.config.vocab_size), (max(one.prompt.tokens + one.tokens) for one in traces.traces)
    if (largest := max(ids)) >= size:
        raise UserError(
            f"{where}: holds the token id {largest} and this backbone has {size}; record traces of your own"
        )
    for number, trace in enumerate(traces.traces, start=1):
        check_room(f"{where}: trace {number}", trace.prompt.tokens, session.prompt_room)


def check_prompts(session: Session) -> None:
    """Refuse missing or unsound prompts or traces, as far as that needs no weights.

    Raises:
        UserError: the first fault.
    """
    _ = session.limits
    traces = session.config.evaluation.traces
    if traces is None:
        open_prompts(session, session.config.evaluation.num_prompts)
        return
    recorded = read_trace_set(Path(traces))
    backbone = session.known_fingerprint or recorded.header.backbone
    check_trace_set(Path(traces), recorded.header, _header(session, backbone, [], 0))
    _check_trace_rooms(session, recorded)


def check_traces(session: Session) -> None:
    """Refuse `evaluation.traces` of another backbone, policy or limits; loads the backbone's weights."""
    if session.config.evaluation.traces is not None:
        kept_traces(session, Path(str(session.config.evaluation.traces)))


def print_seen_prompts(session: Session, passages: Passages) -> None:
    """Print before a training how many of the prompts that will measure the head are in its training text, if any."""
    if session.config.evaluation.traces is not None:
        prompts = [trace.prompt for trace in kept_traces(session, Path(str(session.config.evaluation.traces))).traces]
    else:
        prompts = [one.prompt for one in open_prompts(session, session.config.evaluation.num_prompts)[0]]
    seen = count_seen(passages, session.hasher, [prompt.tokens for prompt in prompts])
    if seen is not None and seen.seen:
        session.folder.print_status(
            f"{seen.seen} of {seen.checked} prompts are trained on, so they do not measure unseen text; give others in "
            "`prompts`"
        )


def _join_copies(session: Session, traces: list[Trace]) -> list[Trace]:
    """Put copies of a prompt into one group, and say how many independent groups there are."""
    prompts = [trace.prompt for trace in traces]
    keys = [session.hasher.text(np.array(prompt.tokens)).tobytes() for prompt in prompts]
    groups = independent_groups([prompt.group for prompt in prompts], keys)
    count = len(set(groups))
    if count == 1:
        session.folder.print_status(
            "all prompts are one independent group, which says nothing about others: every interval is the whole range "
            "of possible values; give different prompts"
        )
    elif count < len(prompts):
        session.folder.print_status(
            f"the {len(prompts)} prompts are {count} independent groups: copies, turns of a conversation and slices of "
            "a document count as one in every interval"
        )
    return [
        replace(trace, prompt=replace(prompt, group=group))
        for trace, prompt, group in zip(traces, prompts, groups, strict=True)
    ]


def describe_work(conversations: list[Conversation], sources: list[Source]) -> str:
    """Return the line before prompts are continued: their number, later turns among them, and their sources."""
    used = ", ".join(f"{source.used} of {source.rows} in {source.name}" for source in sources)
    later = sum(len(one.turns) for one in conversations)
    also = f", then {later} later turns of theirs, each a prompt of its own" if later else ""
    return f"continuing {len(conversations)} prompts with the backbone ({used}){also}"


def gather_traces(session: Session, count: int) -> TraceSet:
    """Return the traces of `evaluation.traces`, or the backbone's continuations of at most `count` prompts."""
    config = session.config
    if config.evaluation.traces is not None:
        traces = kept_traces(session, Path(str(session.config.evaluation.traces)))
        session.folder.print_status(f"measuring on the {len(traces.traces)} traces of {config.evaluation.traces}")
        return replace(traces, traces=_join_copies(session, traces.traces))
    conversations, sources = open_prompts(session, count)
    limits = session.limits
    session.folder.print_status(describe_work(conversations, sources))

    model, done = session.backbone.model, 0
    answer = answer_text(session.source.tokenizer, limits)
    with Progress("decoding prompts", sum(1 + len(one.turns) for one in conversations)) as progress:

        def report(count: int, tokens: int) -> None:
            nonlocal done
            done += count
            progress.update(done, "by the backbone alone", tokens)

        def record(prompts: list[Prompt]) -> list[Trace]:
            return record_traces(model, prompts, limits, session.policy, config.seed, report)

        held = record_conversations(conversations, session.chat, record, answer, session.prompt_room)
    if held.dropped:
        session.folder.print_status(
            f"{held.dropped} later turns were dropped: their conversations no longer fit in the context"
        )
    return TraceSet(_header(session, session.fingerprint, sources, held.dropped), _join_copies(session, held.traces))


def prepare_traces(session: Session) -> TraceSet:
    """Return the traces that an evaluation measures heads on, after writing them to `traces.jsonl`.

    Raises:
        UserError: no trace has a token that could have been drafted.
    """
    traces = gather_traces(session, session.config.evaluation.num_prompts)
    if all(len(trace.tokens) < 2 for trace in traces.traces):
        raise UserError(
            "prompts: every text ends with its first token, so there is nothing to draft; give other prompts"
        )
    session.folder.record()
    write_trace_set(session.folder.path / TRACES_FILE, traces)
    return traces


def replay_head(session: Session, stack: MtpStack, traces: list[Trace]) -> CountsByLength:
    """Return the counts of every trace by draft length, from one rollout."""
    return replay_both(session, stack, traces)[0]


def replay_both(session: Session, stack: MtpStack, traces: list[Trace]) -> tuple[CountsByLength, CountsByLength | None]:
    """Return the counts of `replay_head`, and those with the other kind of draft; None at temperature 0."""
    policy, longest = session.policy, session.config.decoding.draft_length
    stops_early = policy.min_confidence > 0
    drafts, counts = replay_lengths(session.backbone.model, stack, traces, longest, policy, free_running=stops_early)
    return counts, replay_other_drafts(drafts, policy)


def replay_stored(
    session: Session, stack: MtpStack, traces: list[Trace]
) -> tuple[CountsByLength, CountsByLength | None, CountsByLength | None]:
    """Return the counts of `replay_both`, and those with numerics and drafts of the export's target; None for `hf`."""
    counts, other = replay_both(session, stack, traces)
    target = session.config.target
    if target is None or target is ExportTarget.hf:
        return counts, other, None
    stack.compute_as(SERVED[ServedAs(target.value)])
    served, served_other = replay_both(session, stack, traces)
    draws_other = SERVERS[target].draws_greedily and not session.policy.draws_greedily
    return counts, other, served_other if draws_other else served
