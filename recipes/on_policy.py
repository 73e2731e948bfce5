"""`data=on_policy`: train on texts that the backbone writes itself, generated once for all runs with equal settings.

python -m mtptrain +recipe=distill_on_policy
python -m mtptrain +recipe=distill data=on_policy on_policy.prompts=questions.jsonl on_policy.path=texts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from mtptrain.config import MAX_DRAFT_LENGTH, TRAINING, Placement
from mtptrain.config.reads import UNTRAINED
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack
from mtptrain.recipes.lead import lead
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prompt_row_conversations
from mtptrain.run.artifact import begin, check_identity, find_parts
from mtptrain.run.distributed import max_over_processes, on_rank0, rank, world_size
from mtptrain.run.preemption import StopRequest
from mtptrain.run.progress import Progress
from mtptrain.traces.conversation import answer_text, record_conversations
from mtptrain.traces.file import TraceSet
from mtptrain.traces.folder import (
    POLICY,
    SETTING,
    TEXTS,
    TextIdentity,
    TextMaking,
    open_texts,
    outcome,
    read_texts,
    stored_identity,
    text_file,
    write_batch,
)
from mtptrain.traces.on_policy import (
    PromptSet,
    as_corpus,
    describe_batch,
    describe_counts,
    finish_texts,
    text_limits,
    text_recorder,
)
from mtptrain.traces.prompts import read_prompt_rows, slice_conversations


def open_on_policy_prompts(session: Session) -> PromptSet:
    """Return the prompts of `on_policy.prompts`.

    Raises:
        UserError: there are none, or a file cannot be read.
    """
    settings, count = session.config.on_policy, session.config.on_policy.num_prompts
    context = int(session.source.config.max_position_embeddings)
    room = context - settings.max_new_tokens - MAX_DRAFT_LENGTH
    if settings.prompts == [TRAINING]:
        corpus = session.training_corpus
        conversations, source = slice_conversations(corpus, count, settings.prompt_tokens, TRAINING, "on_policy")
        sources = [source]
        # The draws of a text depend on its group, so slices of one document need groups of their own.
        conversations = [
            replace(one, prompt=replace(one.prompt, group=number)) for number, one in enumerate(conversations)
        ]
    else:
        rows = read_prompt_rows(settings.prompts, "on_policy.prompts", "train")
        named, sources = prompt_row_conversations(session, rows, count)
        conversations = [conversation for _, conversation in named]
    kept = sorted(
        (conversation for conversation in conversations if len(conversation.prompt.tokens) <= room),
        key=lambda conversation: len(conversation.prompt.tokens),
    )
    if not kept:
        raise UserError(
            f"on_policy.max_new_tokens={settings.max_new_tokens}: no prompt has room for it in the backbone's context "
            f"of {context} tokens; lower it or shorten the prompts"
        )
    return PromptSet(kept, sources, session.chat, len(conversations) - len(kept), room)


def identify(session: Session, prompts: PromptSet, backbone: str) -> TextIdentity:
    """Return the identity of this run's texts; `backbone` is the fingerprint."""
    settings, chat = session.config.on_policy, prompts.chat
    conversations = [[conversation.prompt.tokens, conversation.turns] for conversation in prompts.conversations]
    content = json.dumps([chat.sha256 if chat else None, conversations])
    return TextIdentity(
        backbone=backbone,
        dtype=session.dtype_name,
        **{name: getattr(settings, name) for name in POLICY},
        max_new_tokens=settings.max_new_tokens,
        stop=sorted(session.stop_ids),
        stop_strings=session.config.decoding.stop_strings,
        prompts=hashlib.sha256(content.encode()).hexdigest(),
    )


def text_folder(session: Session, identity: TextIdentity) -> Path:
    """Return `on_policy.path`, or a folder of the cache named by the identity of its texts."""
    if session.config.on_policy.path is not None:
        return Path(session.config.on_policy.path)
    name = hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode()).hexdigest()[:32]
    return session.cache / f"on-policy-{name}"


def check_texts(session: Session) -> None:
    """Refuse prompts that cannot be read, and a folder of other texts, complete or not; no weight is read.

    An unknown fingerprint is not compared yet.

    Raises:
        UserError: the first fault.
    """
    prompts = open_on_policy_prompts(session)
    if session.config.on_policy.path is None:
        return
    folder, known = Path(session.config.on_policy.path), session.known_fingerprint
    stored = on_rank0(lambda: stored_identity(folder))
    if stored is not None:
        want = identify(session, prompts, known or stored.backbone)
        check_identity(f"{SETTING}={folder}", stored, want, TEXTS.settings)


def write_texts(
    session: Session, head: MtpStack | None, prompts: PromptSet, folder: Path, identity: TextIdentity
) -> None:
    """Write the missing batches, divided among the processes, and then the manifest.

    Raises:
        Preempted: a signal asked the run to stop; finished batches are kept.
    """
    config, settings = session.config, session.config.on_policy

    def open_folder() -> TextMaking:
        session.folder.lock.take(folder, SETTING)
        making = TextMaking(config.seed, settings.draft_length, settings.batch_size)
        return begin(TEXTS, SETTING, folder, identity, making)

    making = on_rank0(open_folder)
    record = text_recorder(session.backbone, head if making.draft_length else None, identity, making)
    tokenizer = session.source.tokenizer
    answer = answer_text(tokenizer, text_limits(identity, tokenizer))
    starts = range(0, len(prompts.conversations), making.batch_size)
    names = [text_file(number) for number in range(len(starts))]
    written = on_rank0(lambda: set(find_parts(folder, names)))
    rank_batches = [number for number, name in enumerate(names) if name not in written][rank() :: world_size()]
    with Progress("on-policy", len(rank_batches)) as progress, StopRequest("batch of texts") as stop:
        for done, number in enumerate(rank_batches, start=1):
            conversations = prompts.conversations[starts[number] : starts[number] + making.batch_size]
            held = record_conversations(conversations, prompts.chat, record, answer, prompts.room)
            write_batch(folder, number, TraceSet(describe_batch(identity, making, prompts, held.dropped), held.traces))
            progress.update(done, "batches", sum(len(trace.tokens) for trace in held.traces))
            if stop.is_made:
                break
    if max_over_processes(int(stop.is_made)):  # a barrier, too: all batches are written
        num_kept = on_rank0(lambda: len(find_parts(folder, names)))
        raise stop.ending(f"{num_kept} of {len(names)} batches of texts are kept in {folder}")

    def close_folder() -> None:
        finish_texts(folder, identity, making, names, prompts.too_long)
        session.folder.lock.release(folder)

    on_rank0(close_folder)


def on_policy_corpus(session: Session, drafting_head: Callable[[], MtpStack]) -> TokenizedCorpus:
    """Return the backbone's own texts as training documents, after generating them if they do not exist yet.

    Args:
        session: of the run; its provenance records the texts.
        drafting_head: returns the head that the training starts from, whole; it drafts the texts unless it is
            untrained. A process calls it if it writes texts.

    Raises:
        UserError: the folder holds other texts or is damaged, or this run cannot make them.
    """
    config, run_folder = session.config, session.folder
    prompts = open_on_policy_prompts(session)
    identity = identify(session, prompts, session.fingerprint)
    folder = text_folder(session, identity)
    if on_rank0(lambda: open_texts(folder, identity)) is None:
        if not session.can_decode:
            raise UserError(
                f"backbone.placement={config.backbone.placement.value}: decodes nothing, and {folder} holds no texts "
                "yet; make them first in a run with backbone.placement=expert_parallel and the same on_policy.path"
            )
        run_folder.print_status(f"continuing {len(prompts.conversations)} prompts with the backbone, into {folder}")

        def write() -> None:
            head = None if config.mtp.init in UNTRAINED else drafting_head()
            write_texts(session, head, prompts, folder, identity)

        if config.backbone.placement is Placement.expert_parallel:
            lead(session, write)
        else:
            write()
    texts = open_texts(folder, identity)
    assert texts is not None
    counts, making = texts.content.counts, texts.content.making
    limit = identity.max_new_tokens
    traces = [trace for trace in read_texts(texts) if outcome(trace, identity.stop, limit) != "empty"]
    run_folder.print_status(describe_counts(counts))
    if not traces:
        raise UserError(f"on_policy.prompts={config.on_policy.prompts}: every text is empty; give other prompts")
    num_cut = sum(len(trace.prompt.tokens) + len(trace.tokens) > config.data.sequence_length for trace in traces)
    if num_cut:
        run_folder.print_status(
            f"{num_cut} texts are longer than data.sequence_length={config.data.sequence_length} and are cut"
        )
    run_folder.on_policy = {"folder": str(folder), "making": asdict(making), **counts}
    return as_corpus(traces)
