"""Prompts that the backbone continues, in its tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mtptrain.config import HELDOUT
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Message, check_messages, check_text
from mtptrain.data.rows import check_readable, json_lines, load_rows, local_files
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.run.storage import sha256_file


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: token ids, at least one.
        domain: what kind of text it is; figures are given by domain.
        group: prompts of one conversation share it; uncertainty is over groups, which are independent of each other.
    """

    tokens: list[int]
    domain: str
    group: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt, and how its conversation goes on.

    Attributes:
        prompt: what is asked first.
        messages: the conversation so far; empty where the prompt is a text.
        turns: what the user says after each answer.
    """

    prompt: Prompt
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)


def slice_prompts(
    corpus: TokenizedCorpus, count: int, length: int, name: str = HELDOUT, section: str = "evaluation"
) -> list[Prompt]:
    """Prompts of `length` tokens, spread evenly over a corpus; none crosses a document's end.

    Args:
        corpus: the documents.
        count: of prompts.
        length: tokens of each.
        name: of the corpus, their domain.
        section: of the settings that say count and length, for the error.

    Raises:
        UserError: the corpus holds fewer.
    """
    starts: list[int] = []
    for begin, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        starts.extend(range(begin, end - length + 1, length))
    if len(starts) < count:
        raise UserError(
            f"{section}.num_prompts={count}: the {name} text has {len(starts)} prompts of "
            f"{section}.prompt_tokens={length}; lower one of them"
        )
    chosen = np.linspace(0, len(starts) - 1, count).round().astype(int)
    tokens = (corpus.tokens[starts[i] : starts[i] + length].tolist() for i in chosen)
    return [Prompt(ids, name, number) for number, ids in enumerate(tokens)]


def encode_prompt_row(
    question: PromptRow, group: int, tokenizer: Tokenizer, begin: list[int], chat: ChatTemplate | None
) -> Conversation:
    """The prompt that a question begins with; a text gets the bos_eos that open every training document.

    Raises:
        UserError: it is a conversation and there is no chat template.
    """
    if not question.messages:
        tokens = begin + tokenizer.encode(question.text, add_special_tokens=False).ids
    elif chat is not None:
        tokens = chat.encode(question.messages)
    else:
        raise UserError(
            f"{question.where} is a conversation and the backbone's tokenizer has no chat template; set "
            "data.chat_template to a jinja file, or write the text itself as `prompt`"
        )
    return Conversation(Prompt(tokens, question.domain, group), question.messages, question.turns)


SUFFIXES = (".jsonl", ".parquet")
KEYS = ("turns", "messages", "prompt")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a prompt file.

    Attributes:
        where: file and line, for errors.
        domain: what kind of text it is.
        text: to be continued as it stands; empty in a conversation.
        messages: the conversation up to the first answer that is asked for; empty for a text.
        turns: what the user says next, each after the answer before it.
    """

    where: str
    domain: str
    text: str
    messages: list[Message]
    turns: list[str]


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The rows of one file or data set.

    Attributes:
        name: as the user gave it, or the file in the folder that was given.
        sha256: of the file's bytes; of a data set, of its rows as JSON lines.
        questions: in their order.
    """

    name: str
    sha256: str
    questions: list[PromptRow]


@dataclass(frozen=True, slots=True)
class Source:
    """Where prompts came from.

    Attributes:
        name: a file, a data set, or `heldout`.
        sha256: of a file's bytes, of a data set's rows, or of the held-out tokens.
        rows: how many prompts or conversations it holds.
        used: how many of them were asked.
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
    """Every source that a setting means; a folder is one a file.

    Args:
        names: of files, folders and data sets.
        setting: where they stand, for the error.
        split: of a data set; None takes `test` where it has one, else its first.

    Raises:
        UserError: one cannot be read, or a row is no question.
    """
    sources = []
    for name in names:
        path = Path(name)
        if path.exists() or path.suffix in SUFFIXES:
            files = local_files(f"{setting}={name}", path, SUFFIXES)
            sources += [_read_file(file, f"{setting}={file}") for file in files]
        else:
            sources.append(read_dataset(name, setting, split))
    return sources


def spread_prompt_rows(sources: list[PromptSource], count: int) -> list[list[PromptRow]]:
    """At most `count` questions, as even over the sources as these allow, and evenly over the rows of each."""
    chosen = []
    for source, used in zip(sources, even_shares([len(source.questions) for source in sources], count), strict=True):
        rows = np.linspace(0, len(source.questions) - 1, used).round().astype(int)
        chosen.append([source.questions[row] for row in rows])
    return chosen


def even_shares(sizes: list[int], count: int) -> list[int]:
    """How many of `count` each gets: the same, but none more than its size. ([10, 2, 10], 8) -> [3, 2, 3]."""
    shares, left = [0] * len(sizes), count
    for done, place in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[place] = min(sizes[place], left // (len(sizes) - done))
        left -= shares[place]
    return shares


def _read_file(path: Path, setting: str) -> PromptSource:
    check_readable(setting, path)
    if path.suffix == ".jsonl":
        rows = json_lines(setting, path)
    else:
        rows = enumerate(load_rows(setting, "parquet", split="train", data_files=str(path)), start=1)
    return PromptSource(str(path), sha256_file(path), _questions(setting, path.stem, rows))


def read_dataset(name: str, setting: str = "prompts", split: str | None = None) -> PromptSource:
    """A data set of `datasets.load_dataset`; see `read_prompt_rows`."""
    setting = f"{setting}={name}"
    rows = list(load_rows(setting, name, **({} if split is None else {"split": split})))
    lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    sha256 = hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return PromptSource(name, sha256, _questions(setting, name.rsplit("/", 1)[-1], enumerate(rows, start=1)))


def _questions(setting: str, domain: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> list[PromptRow]:
    found = [_question(f"{setting}: line {number}", domain, row) for number, row in rows]
    if not found:
        raise UserError(f"{setting}: holds no prompt; write a row with {', '.join(KEYS[:2])} or prompt")
    return found


def _question(where: str, domain: str, row: dict[str, Any]) -> PromptRow:
    """The question of a row. Of `turns`, `messages` and `prompt` the first that it has counts.

    Raises:
        UserError: it has none of them, or one that is empty or of another form.
    """
    given = row.get("domain")
    domain = given if isinstance(given, str) and given else domain
    key = next((key for key in KEYS if row.get(key) is not None), None)
    if key is None:
        raise UserError(f"{where} has none of {', '.join(KEYS)}; it has {sorted(row)}; rename the key that holds it")
    value = row[key]
    if key == "prompt":
        return PromptRow(where, domain, check_text(where, key, value), [], [])
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{key}` must be a list that is not empty; see docs/prompts.md")
    if key == "turns":
        first, *later = [check_text(where, key, turn) for turn in value]
        return PromptRow(where, domain, "", [{"role": "user", "content": first}], later)
    return PromptRow(where, domain, "", _messages(where, value), [])


def _messages(where: str, value: list[Any]) -> list[Message]:
    """Messages up to the last that is not the assistant's: its own answer takes the place of one that is given."""
    messages = check_messages(where, value)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(one["role"] == "user" for one in messages):
        raise UserError(f"{where}: `messages` asks nothing; it needs a message of role user")
    return messages
