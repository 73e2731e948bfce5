"""The traces that a run measures heads on: read from disk, or prompts continued by the backbone; and their replay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtptrain.backbone.load import Backbone
from mtptrain.config import HELDOUT, RunConfig
from mtptrain.data.prompts import Opening, Prompt, encode_question, slice_prompts
from mtptrain.data.questions import QuestionSource, Source, read_questions, spread_questions
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.decoding.policy import decoding_policy
from mtptrain.decoding.records import Limits
from mtptrain.errors import UserError
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.conversation import hold_conversations
from mtptrain.evaluation.drafts import draft_traces
from mtptrain.evaluation.replay import replay_all
from mtptrain.evaluation.trace import Trace, record_traces
from mtptrain.evaluation.trace_set import (
    TraceHeader,
    TraceSet,
    check_trace_set,
    read_trace_set,
    write_trace_set,
)
from mtptrain.mtp.stack import MtpStack
from mtptrain.recipes.inputs import open_chat
from mtptrain.run_folder import RunFolder

TRACES_FILE = "traces.jsonl"


def stop_ids(stop: list[str | int], backbone: Backbone) -> frozenset[int]:
    """The tokens that end a text: the backbone's end mark and those of `decoding.stop`.

    Raises:
        UserError: one is no token of the backbone.
    """
    found = set(backbone.marks[1])
    size = backbone.tokenizer.get_vocab_size()
    for one in stop:
        if isinstance(one, int):
            ids = [one] if 0 <= one < size else []
        else:
            named = backbone.tokenizer.token_to_id(one)
            ids = backbone.tokenizer.encode(one, add_special_tokens=False).ids if named is None else [named]
        if len(ids) != 1:
            raise UserError(
                f"decoding.stop={one}: is not one token of the backbone's {size}; give the text of a single token, or "
                "its id"
            )
        found.update(ids)
    return frozenset(found)


def decoding_limits(config: RunConfig, backbone: Backbone) -> Limits:
    """Where a text ends."""
    return Limits(config.decoding.max_new_tokens, stop_ids(config.decoding.stop, backbone))


def prompt_room(config: RunConfig, backbone: Backbone) -> int:
    """Tokens that a prompt may have: the backbone's context without what is emitted and drafted after it.

    Raises:
        UserError: there is none.
    """
    context, decoding = backbone.config.max_position_embeddings, config.decoding
    room = context - decoding.max_new_tokens - decoding.draft_length
    if room < 1:
        raise UserError(
            f"decoding.max_new_tokens={decoding.max_new_tokens}: leaves no room for a prompt in the backbone's context "
            f"of {context} tokens at decoding.draft_length={decoding.draft_length}; lower it"
        )
    return room


def _check_room(where: str, tokens: list[int], room: int) -> None:
    if len(tokens) > room:
        raise UserError(
            f"{where}: the prompt has {len(tokens)} tokens and the backbone's context holds {room} beside what is "
            "emitted and drafted; shorten it, or lower decoding.max_new_tokens"
        )


def slice_openings(
    corpus: TokenizedCorpus, count: int, length: int, name: str = HELDOUT, section: str = "evaluation"
) -> tuple[list[Opening], Source]:
    """Prompts cut from a corpus, see `slice_prompts`, and where they came from."""
    prompts = slice_prompts(corpus, count, length, name, section)
    digest = hashlib.sha256(corpus.tokens.tobytes()).hexdigest()
    rows = int((np.diff(corpus.offsets) // length).sum())
    return [Opening(prompt) for prompt in prompts], Source(name, digest, rows, count)


def question_openings(
    config: RunConfig, backbone: Backbone, found: list[QuestionSource], count: int
) -> tuple[list[tuple[str, Opening]], list[Source]]:
    """At most `count` of the questions as prompts, evenly spread, each with its file and line, and their sources."""
    chat = open_chat(config, backbone)
    openings: list[tuple[str, Opening]] = []
    sources = []
    for source, questions in zip(found, spread_questions(found, count), strict=True):
        for question in questions:
            opening = encode_question(question, len(openings), backbone.tokenizer, backbone.marks[0], chat)
            openings.append((question.where, opening))
        sources.append(Source(source.name, source.sha256, len(source.questions), len(questions)))
    return openings, sources


def open_prompts(
    config: RunConfig, backbone: Backbone, corpus: TokenizedCorpus, count: int
) -> tuple[list[Opening], list[Source]]:
    """At most `count` prompts or conversations of `prompts`, evenly spread, and where they came from.

    Raises:
        UserError: there are none, or one cannot be read, is empty or outgrows the context.
    """
    room = prompt_room(config, backbone)
    if config.prompts == [HELDOUT]:
        openings, source = slice_openings(corpus, count, config.evaluation.prompt_tokens)
        _check_room(f"evaluation.prompt_tokens={config.evaluation.prompt_tokens}", openings[0].prompt.tokens, room)
        return openings, [source]
    named, sources = question_openings(config, backbone, read_questions(config.prompts), count)
    for where, opening in named:
        _check_room(where, opening.prompt.tokens, room)
    return [opening for _, opening in named], sources


def _header(config: RunConfig, backbone: Backbone, sources: list[Source], dropped: int) -> TraceHeader:
    policy, limits = decoding_policy(config.decoding), decoding_limits(config, backbone)
    chat = open_chat(config, backbone)
    return TraceHeader(
        backbone=backbone.fingerprint,
        dtype=str(backbone.model.lm_head.weight.dtype).removeprefix("torch."),
        temperature=policy.temperature,
        top_k=policy.top_k,
        top_p=policy.top_p,
        max_new_tokens=limits.max_new_tokens,
        stop=sorted(limits.stop),
        seed=config.seed,
        chat_template=chat.sha256 if chat else None,
        sources=sources,
        dropped=dropped,
    )


def _read_traces(config: RunConfig, backbone: Backbone) -> TraceSet:
    """The traces of `evaluation.traces`, which this backbone must have written as this run would."""
    path = Path(str(config.evaluation.traces))
    traces = read_trace_set(path)
    check_trace_set(path, traces.header, _header(config, backbone, [], 0))
    room = prompt_room(config, backbone)
    for number, trace in enumerate(traces.traces, start=1):
        _check_room(f"evaluation.traces={path}: trace {number}", trace.prompt.tokens, room)
    return traces


def check_prompts(config: RunConfig, backbone: Backbone, corpus: TokenizedCorpus) -> None:
    """Raise a `UserError` unless everything that an evaluation starts from is there and sound."""
    if config.evaluation.traces is not None:
        _read_traces(config, backbone)
    else:
        open_prompts(config, backbone, corpus, config.evaluation.num_prompts)
        decoding_limits(config, backbone)


def answer_text(backbone: Backbone, stop: frozenset[int]) -> Callable[[list[int]], str]:
    """Reads emitted tokens as what was said in a conversation: without marks, and without the token that ended it."""

    def answer(tokens: list[int]) -> str:
        said = tokens[:-1] if tokens[-1] in stop else tokens
        return backbone.tokenizer.decode(said, skip_special_tokens=True)

    return answer


def gather_traces(
    config: RunConfig, run_folder: RunFolder, backbone: Backbone, corpus: TokenizedCorpus, count: int
) -> TraceSet:
    """The traces of `evaluation.traces`, else the backbone's texts after at most `count` prompts or conversations."""
    if config.evaluation.traces is not None:
        traces = _read_traces(config, backbone)
        run_folder.say(f"measuring on the {len(traces.traces)} traces of {config.evaluation.traces}")
        return traces
    openings, sources = open_prompts(config, backbone, corpus, count)
    policy, limits = decoding_policy(config.decoding), decoding_limits(config, backbone)
    used = ", ".join(f"{source.used} of {source.rows} in {source.name}" for source in sources)
    run_folder.say(f"continuing {len(openings)} prompts with the backbone ({used})")

    def record(prompts: list[Prompt]) -> list[Trace]:
        return record_traces(backbone.model, prompts, limits, policy, config.seed)

    answer, room = answer_text(backbone, limits.stop), prompt_room(config, backbone)
    held = hold_conversations(openings, open_chat(config, backbone), record, answer, room)
    if held.dropped:
        run_folder.say(f"{held.dropped} later turns were not asked: the conversation had outgrown the context")
    return TraceSet(_header(config, backbone, sources, held.dropped), held.traces)


def prepare_traces(config: RunConfig, run_folder: RunFolder, backbone: Backbone, corpus: TokenizedCorpus) -> TraceSet:
    """The traces that an evaluation measures heads on, as its `traces.jsonl` keeps them.

    Raises:
        UserError: no trace has a token that could have been drafted.
    """
    traces = gather_traces(config, run_folder, backbone, corpus, config.evaluation.num_prompts)
    if all(len(trace.tokens) < 2 for trace in traces.traces):
        raise UserError(
            "prompts: every text ends with its first token, so there is nothing to draft; give other prompts"
        )
    run_folder.record()
    write_trace_set(run_folder.path / TRACES_FILE, traces)
    return traces


def replay_head(config: RunConfig, backbone: Backbone, stack: MtpStack, traces: list[Trace]) -> Replayed:
    """Counts of every trace for every draft length, from one rollout."""
    policy = decoding_policy(config.decoding)
    stops = policy.stop_below > 0
    drafts = draft_traces(backbone.model, stack, traces, config.decoding.draft_length, policy, free_running=stops)
    return replay_all(drafts, policy)
