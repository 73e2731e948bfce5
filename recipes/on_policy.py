"""`data=on_policy`: texts that the backbone writes itself, made once and trained on by every run that means the same.

python -m mtptrain +recipe=distill_on_policy
python -m mtptrain +recipe=distill data=on_policy on_policy.prompts=questions.jsonl on_policy.path=texts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mtptrain.backbone.load import Backbone
from mtptrain.config import MAX_DRAFT_LENGTH, TRAINING
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.draws import row_seed
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import answer_text, prompt_row_conversations, slice_conversations
from mtptrain.run.artifact import begin, find_parts, finish, total_counts
from mtptrain.run.distributed import max_over_processes, on_rank0, rank, world_size
from mtptrain.run.progress import Progress
from mtptrain.traces.conversation import hold_conversations
from mtptrain.traces.file import Source, Trace, TraceHeader, TraceSet
from mtptrain.traces.folder import (
    SETTING,
    TEXTS,
    TextContent,
    TextIdentity,
    TextMaking,
    open_texts,
    outcome,
    read_texts,
    text_file,
    write_batch,
)
from mtptrain.traces.prompts import Conversation, Prompt, read_prompt_rows


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What the backbone is asked to continue.

    Attributes:
        conversations: shortest prompt first, so that prompts of like length are decoded together.
        sources: of the prompts.
        chat: renders their conversations.
        too_long: prompts left out because nothing could be emitted after them in the backbone's context.
        room: tokens that a prompt may have.
    """

    conversations: list[Conversation]
    sources: list[Source]
    chat: ChatTemplate | None
    too_long: int
    room: int


def open_on_policy_prompts(session: Session) -> PromptSet:
    """The prompts of `on_policy.prompts`.

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
    else:
        found = read_prompt_rows(settings.prompts, "on_policy.prompts", "train")
        named, sources = prompt_row_conversations(session, found, count)
        conversations = [conversation for _, conversation in named]
    kept = sorted(
        (conversation for conversation in conversations if len(conversation.prompt.tokens) <= room),
        key=lambda one: len(one.prompt.tokens),
    )
    if not kept:
        raise UserError(
            f"on_policy.max_new_tokens={settings.max_new_tokens}: no prompt has room for it in the backbone's context "
            f"of {context} tokens; lower it or shorten the prompts"
        )
    return PromptSet(kept, sources, session.chat, len(conversations) - len(kept), room)


def identify(session: Session, asked: PromptSet) -> TextIdentity:
    """What the texts of this run are."""
    settings, chat = session.config.on_policy, asked.chat
    questions = [[conversation.prompt.tokens, conversation.turns] for conversation in asked.conversations]
    prompts = json.dumps([chat.sha256 if chat else None, questions])
    return TextIdentity(
        backbone=session.fingerprint,
        dtype=session.dtype_name,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        stop=sorted(session.stop_ids),
        prompts=hashlib.sha256(prompts.encode()).hexdigest(),
    )


def text_folder(session: Session, identity: TextIdentity) -> Path:
    """`on_policy.path`, else a folder of the cache that is named by what its texts are."""
    if session.config.on_policy.path is not None:
        return Path(session.config.on_policy.path)
    name = hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode()).hexdigest()[:32]
    return session.cache / f"on-policy-{name}"


def text_recorder(
    backbone: Backbone, head: MtpStack | None, identity: TextIdentity, making: TextMaking
) -> Callable[[list[Prompt]], list[Trace]]:
    """Continues prompts that are decoded together; the draws are those of a prompt's number and slots alone."""
    limits = Limits(identity.max_new_tokens, frozenset(identity.stop))
    policy = Policy(temperature=identity.temperature, top_k=identity.top_k, top_p=identity.top_p)
    proposer, length = (None, 0) if head is None else (MtpProposer(backbone.model, head), making.draft_length)

    def record(prompts: list[Prompt]) -> list[Trace]:
        seeds = [row_seed(making.seed, prompt.group) for prompt in prompts]
        run = decode_speculative(
            backbone.model, proposer, [prompt.tokens for prompt in prompts], length, limits, policy, seeds
        )
        return [
            Trace(prompt, row.tokens, row.gaps, row.probabilities)
            for prompt, row in zip(prompts, run.rows, strict=True)
        ]

    return record


def describe_batch(identity: TextIdentity, making: TextMaking, asked: PromptSet, dropped: int) -> TraceHeader:
    """The header of a batch's trace set."""
    return TraceHeader(
        **{name: value for name, value in asdict(identity).items() if name != "prompts"},
        seed=making.seed,
        chat_template=asked.chat.sha256 if asked.chat else None,
        sources=asked.sources,
        dropped=dropped,
    )


def write_texts(
    session: Session, head: MtpStack | None, asked: PromptSet, folder: Path, identity: TextIdentity
) -> None:
    """Write the batches that are missing, every process its share of them, and the manifest last."""
    config, settings = session.config, session.config.on_policy

    def open_folder() -> TextMaking:
        session.folder.lock.take(folder, SETTING)
        making = TextMaking(config.seed, settings.draft_length, settings.batch_size)
        return begin(TEXTS, SETTING, folder, identity, making)

    making = on_rank0(open_folder)
    record = text_recorder(session.backbone, head if making.draft_length else None, identity, making)
    answer = answer_text(session.source.tokenizer, frozenset(identity.stop))
    starts = range(0, len(asked.conversations), making.batch_size)
    names = [text_file(number) for number in range(len(starts))]
    written = on_rank0(lambda: set(find_parts(folder, names)))
    own = [number for number, name in enumerate(names) if name not in written][rank() :: world_size()]
    with Progress("on-policy", len(own)) as progress:
        for done, number in enumerate(own, start=1):
            conversations = asked.conversations[starts[number] : starts[number] + making.batch_size]
            held = hold_conversations(conversations, asked.chat, record, answer, asked.room)
            write_batch(folder, number, TraceSet(describe_batch(identity, making, asked, held.dropped), held.traces))
            progress.update(done, "batches", sum(len(trace.tokens) for trace in held.traces))
    max_over_processes(0)  # all batches are written

    def close_folder() -> None:
        finish_texts(folder, identity, making, names, asked.too_long)
        session.folder.lock.release(folder)

    on_rank0(close_folder)


def finish_texts(folder: Path, identity: TextIdentity, making: TextMaking, names: list[str], too_long: int) -> None:
    """Write the manifest; all files `names` are there, and `too_long` prompts were left out."""
    files = find_parts(folder, names)
    assert len(files) == len(names)
    counts = total_counts(files)
    counts |= {"prompts": counts["prompts"] + too_long, "too_long": too_long}
    finish(TEXTS, folder, identity, files, TextContent(making, counts))


def describe_counts(counts: dict[str, int]) -> str:
    """What became of the prompts, in a line."""
    failed = counts["empty"] + counts["too_long"] + counts["dropped_turns"]
    return (
        f"{counts['texts']} texts of {counts['tokens']:,} tokens from {counts['prompts']} prompts: {counts['stopped']} "
        f"ended at a stop token, {counts['full']} at on_policy.max_new_tokens; {failed} failed ({counts['empty']} gave "
        f"nothing, {counts['too_long']} were too long for the context, {counts['dropped_turns']} turns outgrew it)"
    )


def as_corpus(traces: list[Trace]) -> TokenizedCorpus:
    """Every text after its prompt as a document; only what the backbone wrote may be a target."""
    sizes = [len(trace.prompt.tokens) + len(trace.tokens) for trace in traces]
    loss_mask = [[False] * len(trace.prompt.tokens) + [True] * len(trace.tokens) for trace in traces]
    return TokenizedCorpus(
        tokens=np.concatenate([np.asarray(trace.prompt.tokens + trace.tokens, np.int32) for trace in traces]),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
        num_bytes=0,  # no figure is given by the byte
        loss_mask=np.concatenate([np.asarray(part, bool) for part in loss_mask]),
    )


def on_policy_corpus(session: Session, stack: MtpStack) -> TokenizedCorpus:
    """The backbone's own texts as training documents, read or, where they are not there yet, made.

    Args:
        session: of the run; its provenance records which texts were used.
        stack: the head that the training starts from, which drafts them unless it knows nothing yet.

    Raises:
        UserError: the folder holds other texts or is damaged, or this run cannot make them.
    """
    config, run_folder = session.config, session.folder
    asked = open_on_policy_prompts(session)
    identity = identify(session, asked)
    folder = text_folder(session, identity)
    if on_rank0(lambda: open_texts(folder, identity)) is None:
        if not session.can_decode:
            raise UserError(
                f"backbone.placement={config.backbone.placement.value}: decodes nothing, and {folder} holds no texts "
                "yet; make them first in a run with backbone.placement=replicate and the same on_policy.path"
            )
        run_folder.print_status(f"continuing {len(asked.conversations)} prompts with the backbone, into {folder}")
        head = None if config.mtp.init in ("fresh", "backbone") else stack
        write_texts(session, head, asked, folder, identity)
    texts = open_texts(folder, identity)
    assert texts is not None
    counts, making = texts.content.counts, texts.content.making
    traces = [trace for trace in read_texts(texts) if outcome(trace, identity.stop) != "empty"]
    run_folder.print_status(describe_counts(counts))
    if not traces:
        raise UserError(f"on_policy.prompts={config.on_policy.prompts}: every text is empty; give other prompts")
    cut = sum(len(trace.prompt.tokens) + len(trace.tokens) > config.data.sequence_length for trace in traces)
    if cut:
        run_folder.print_status(
            f"{cut} texts are longer than data.sequence_length={config.data.sequence_length} and are cut"
        )
    run_folder.on_policy = {"folder": str(folder), "making": asdict(making), **counts}
    return as_corpus(traces)
