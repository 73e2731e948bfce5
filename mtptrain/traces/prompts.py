"""Prompts: read from files and data sets or cut from a corpus, selected evenly, and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mtptrain.config import HELDOUT, TRAINING, DataFormat, did_you_mean
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Message, Tool
from mtptrain.data.files import ROW_KINDS, Row, check_readable, kind_of, local_files, read_rows, stem_of
from mtptrain.data.forms import read_conversation, recognise
from mtptrain.data.messages import check_text
from mtptrain.data.notes import note
from mtptrain.data.rows import load_rows
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run.storage import sha256_file
from mtptrain.traces.benchmarks import benchmark_name, check_unambiguous, choose_dataset, load_questions


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: token ids, at least one.
        domain: kind of text; results are broken down by domain.
        group: number shared by prompts that depend on each other: those of a conversation, slices of one document and
            copies; confidence intervals resample groups, as independent.
    """

    tokens: list[int]
    domain: str
    group: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and the later user turns of its conversation.

    Attributes:
        prompt: the first prompt.
        messages: the conversation so far; empty if the prompt is a text.
        turns: later user turns, each to follow an answer.
        tools: the functions that the assistant may call.
    """

    prompt: Prompt
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)


def slice_prompts(
    corpus: TokenizedCorpus, count: int, length: int, name: str = HELDOUT, section: str = "evaluation"
) -> list[Prompt]:
    """Cut prompts of `length` tokens from a corpus, spread evenly; none crosses the end of a document.

    Args:
        corpus: the documents.
        count: number of prompts.
        length: tokens per prompt.
        name: name of the corpus, used as the domain.
        section: section of the settings num_prompts and prompt_tokens, for the error.

    Raises:
        UserError: the corpus has fewer than `count` prompts.
    """
    starts: list[int] = []
    for begin, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        starts.extend(range(begin, end - length + 1, length))
    if len(starts) < count:
        raise UserError(
            f"{section}.num_prompts={count}: the {name} text has {len(starts)} prompts of "
            f"{section}.prompt_tokens={length}; lower one of them"
        )
    chosen = [starts[i] for i in np.linspace(0, len(starts) - 1, count).round().astype(int)]
    documents = (np.searchsorted(corpus.offsets, chosen, side="right") - 1).tolist()
    return [
        Prompt(corpus.tokens[start : start + length].tolist(), name, document)
        for start, document in zip(chosen, documents, strict=True)
    ]


def independent_groups(groups: list[int], keys: list[bytes]) -> list[int]:
    """Return the groups after joining, in chains if need be, all that share a key: copies of a prompt depend on it.

    ([0, 1, 1, 2], [a, a, b, b]) -> [0, 0, 0, 0]
    """
    leader: dict[int, int] = {}
    by_key: dict[bytes, int] = {}

    def first(group: int) -> int:
        while leader.setdefault(group, group) != group:
            group = leader[group]
        return group

    for group, key in zip(groups, keys, strict=True):
        one, other = first(group), first(by_key.setdefault(key, group))
        leader[max(one, other)] = min(one, other)
    return [first(group) for group in groups]


def encode_prompt_row(
    row: PromptRow, group: int, tokenizer: Tokenizer, begin: list[int], chat: ChatTemplate | None
) -> Conversation:
    """Encode the first prompt of a row; a text begins with the ids that open every training document.

    Args:
        row: the row.
        group: group of its prompts.
        tokenizer: the backbone's.
        begin: ids that open every training document.
        chat: renders conversations; None if there is no template.

    Raises:
        UserError: the row is a conversation and there is no chat template, or it rejects the conversation.
    """
    if not row.messages:
        tokens = begin + tokenizer.encode(row.text, add_special_tokens=False).ids
    elif chat is not None:
        try:
            tokens = chat.encode(row.messages, row.tools)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    else:
        raise UserError(
            f"{row.where} is a conversation and the backbone's tokenizer has no chat template; set "
            "data.chat_template to a jinja file or to builtin, or write the text itself as `prompt`"
        )
    return Conversation(Prompt(tokens, row.domain, group), row.messages, row.turns, row.tools)


KEYS = ("turns", "messages", "prompt")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a prompt file.

    Attributes:
        where: file and line, for errors.
        domain: kind of text.
        text: a text to continue as it is; empty for a conversation.
        messages: the conversation up to the first answer to record; empty for a text.
        turns: later user turns, each to follow an answer.
        tools: the functions that the assistant may call.
    """

    where: str
    domain: str
    text: str
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The rows of one file or data set.

    Attributes:
        name: the name of the setting, or a file of the folder of that name.
        sha256: SHA-256 of the file's bytes; for a data set, of its rows as JSON lines.
        prompt_rows: the rows, in order.
    """

    name: str
    sha256: str
    prompt_rows: list[PromptRow]


@dataclass(frozen=True, slots=True)
class Source:
    """The provenance of prompts, for trace sets and results.

    Attributes:
        name: a file, a data set, or `heldout`.
        sha256: SHA-256 of a file's bytes, of a data set's rows, or of the held-out tokens.
        rows: number of prompts or conversations in the source.
        used: number of those that were continued.
    """

    name: str
    sha256: str
    rows: int
    used: int


def slice_conversations(
    corpus: TokenizedCorpus, count: int, length: int, name: str = HELDOUT, section: str = "evaluation"
) -> tuple[list[Conversation], Source]:
    """Return the prompts of `slice_prompts` as conversations, and their source."""
    prompts = slice_prompts(corpus, count, length, name, section)
    digest = hashlib.sha256(corpus.tokens.tobytes()).hexdigest()
    rows = int((np.diff(corpus.offsets) // length).sum())
    return [Conversation(prompt) for prompt in prompts], Source(name, digest, rows, count)


def read_prompt_rows(names: list[str], setting: str = "prompts", split: str | None = None) -> list[PromptSource]:
    """Read every source of a setting; each file of a folder is a source.

    Args:
        names: files, folders and data sets, these as in `read_dataset`.
        setting: name of the setting, for the error.
        split: split of data sets; None = `test`, or the first split if there is no `test`.

    Raises:
        UserError: a source cannot be read or has no row, or a row is no prompt.
    """
    sources = []
    for name in names:
        path = Path(name)
        check_unambiguous(f"{setting}={name}", name.partition(":")[0])
        if benchmark_name(name) is None and (path.exists() or kind_of(path) in ROW_KINDS):
            files = local_files(f"{setting}={name}", path, ROW_KINDS)
            sources += [_read_file(file, f"{setting}={file}") for file in files]
        else:
            try:
                sources.append(read_dataset(name, setting, split))
            except UserError as error:
                word = HELDOUT if setting == "prompts" else TRAINING
                raise UserError(f"{error}{did_you_mean(name, [word])}") from None
    return sources


def spread_prompt_rows(sources: list[PromptSource], count: int) -> list[list[PromptRow]]:
    """Return at most `count` rows by source, as even over the sources as sizes allow, and spread evenly in each."""
    chosen = []
    for source, used in zip(sources, even_shares([len(source.prompt_rows) for source in sources], count), strict=True):
        rows = np.linspace(0, len(source.prompt_rows) - 1, used).round().astype(int)
        chosen.append([source.prompt_rows[row] for row in rows])
    return chosen


def even_shares(sizes: list[int], count: int) -> list[int]:
    """Divide `count` into equal shares, none above its size: ([10, 2, 10], 8) -> [3, 2, 3]."""
    shares, left = [0] * len(sizes), count
    for done, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], left // (len(sizes) - done))
        left -= shares[index]
    return shares


def _read_file(path: Path, setting: str) -> PromptSource:
    check_readable(setting, path)
    rows: Iterator[tuple[int, Row | UserError]]
    if kind_of(path) == ".parquet":
        rows = enumerate(load_rows(setting, "parquet", split="train", data_files=str(path)), start=1)
    else:
        rows = read_rows(setting, path)
    return PromptSource(str(path), sha256_file(path), _prompt_rows(setting, stem_of(path), rows))


def read_dataset(name: str, setting: str = "prompts", split: str | None = None) -> PromptSource:
    """Read a data set with `datasets.load_dataset`; other arguments and errors as in `read_prompt_rows`.

    Args:
        name: NAME, NAME:SUBSET or NAME:SUBSET:SPLIT, such as `openai/gsm8k:main:test`; NAME::SPLIT has one subset. NAME
            may be one of `BENCHMARKS`, which have a subset and a split of their own.
        setting: name of the setting, for the error.
        split: the split if the name has none.
    """
    setting = f"{setting}={name}"
    choice = choose_dataset(setting, name, split)
    rows, sha256 = load_questions(setting, choice)
    return PromptSource(choice.name, sha256, _prompt_rows(setting, choice.domain, enumerate(rows, start=1)))


def _prompt_rows(setting: str, domain: str, rows: Iterator[tuple[int, Row | UserError]]) -> list[PromptRow]:
    prompt_rows = []
    for number, row in rows:
        if isinstance(row, UserError):
            raise row
        prompt_rows.append(_prompt_row(f"{setting}: line {number}", domain, row))
    if not prompt_rows:
        raise UserError(f"{setting}: holds no prompt; write a row with {', '.join(KEYS[:2])} or prompt")
    return prompt_rows


def _prompt_row(where: str, domain: str, row: Row) -> PromptRow:
    """Parse a row by the first of the keys `turns`, `messages` and `prompt` that it has, else as training rows are.

    Raises:
        UserError: the row has none of the keys and no known form, or the value is empty or has another form.
    """
    row_domain = row.get("domain")
    domain = row_domain if isinstance(row_domain, str) and row_domain else domain
    key = next((key for key in KEYS if row.get(key) is not None), None)
    if key == "turns":
        first, *later = [check_text(where, key, turn) for turn in _filled_list(where, key, row[key])]
        return PromptRow(where, domain, "", [{"role": "user", "content": first}], later)
    if key == "prompt" and not _holds_messages(row[key]):
        return PromptRow(where, domain, check_text(where, key, row[key]))
    if key == "prompt":
        row = {"messages": row[key], "tools": row.get("tools")}  # without its completion
    form = recognise(row, "messages")
    if form is None and key is None:
        raise UserError(f"{where} has none of {', '.join(KEYS)}; it has {sorted(row)}; rename the key that holds it")
    if form is None:
        raise UserError(f"{where}: `messages` must be a list that is not empty; see docs/prompts.md")
    if form is not DataFormat.messages:
        note(f"{where.rpartition(': line ')[0]}: rows are read as conversations of the form {form.value}")
    content = read_conversation(where, row, "messages", form)
    return PromptRow(where, domain, "", _unanswered(where, content.messages), tools=content.tools)


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _filled_list(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{key}` must be a list that is not empty; see docs/prompts.md")
    return value


def _unanswered(where: str, messages: list[Message]) -> list[Message]:
    """Return the messages without assistant messages at the end: the backbone gives its own answer."""
    _filled_list(where, "messages", messages)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not any(one["role"] == "user" for one in messages):
        raise UserError(f"{where}: `messages` asks nothing; it needs a message of role user")
    return messages
