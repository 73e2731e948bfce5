"""Conversations as text and tokens, through a chat template, with a mask of the assistant's tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from mtptrain.config import DataConfig, Turns
from mtptrain.data.documents import Call, Message, Tool
from mtptrain.data.messages import REASONING
from mtptrain.data.notes import note
from mtptrain.errors import UserError
from mtptrain.run.typed_json import JsonObject

BUILTIN = "builtin"  # of data.chat_template: the template beside this file
FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)  # in a template's code
PROBE = "\ue000"  # a private character, so no content begins with it


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation, or its beginning, for training.

    Attributes:
        text: rendered.
        tokens: token ids of the text.
        loss_mask: True for the targets, which are the assistant's tokens.
    """

    text: str
    tokens: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Renders and encodes conversations.

    Attributes:
        text: the jinja template.
        source: the template's file.
        special_tokens: special tokens by the name that the template uses, e.g. `bos_token`.
        tokenizer: encodes special tokens in rendered text as such, also those spelt out in a message.
        begin: ids that open every training document; prepended unless the template writes them.
        arguments: further variables of the template, `data.chat_template_kwargs`.
        turns: answers that are targets in training.
    """

    text: str
    source: Path
    special_tokens: dict[str, str]
    tokenizer: Tokenizer
    begin: list[int]
    arguments: JsonObject = field(default_factory=dict)
    turns: Turns = Turns.all

    @property
    def sha256(self) -> str:
        """SHA-256, in hexadecimal, of the template's text and its further variables, if any."""
        content = json.dumps([self.text, self.arguments], sort_keys=True) if self.arguments else self.text
        return hashlib.sha256(content.encode()).hexdigest()

    def render(
        self, messages: list[Message], add_generation_prompt: bool = True, tools: list[Tool] | None = None
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: all messages so far.
            add_generation_prompt: end with the opening of an assistant message instead of after the last message.
            tools: the functions that the assistant may call.

        Raises:
            UserError: the template rejects the messages or is broken.
        """
        named = {**self.special_tokens, **self.arguments, "add_generation_prompt": add_generation_prompt}
        try:
            return _render(self.text, _as_read(messages, _call_style(self.text)), tools, named)
        except FAULTS as error:
            reason = " ".join(str(error).split())
            raise UserError(f"chat template {self.source}: cannot render a conversation ({reason}); mend it") from None

    def encode(self, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """Return the token ids of a conversation that ends with the opening of an assistant message.

        Raises:
            UserError: the template rejects the messages or leaves out a tool call.
        """
        text = self.render(messages, tools=tools)
        self._note_tools(text, tools)
        for one in messages:
            self._check_calls(one, text)
        return self._open(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_rows(self, messages: list[Message], tools: list[Tool] | None = None) -> list[ChatRow]:
        """Return a conversation as training rows: one, or with `Turns.each` one for every answer.

        An answer counts from the end of its opening, where decoding would begin, through its closing token; one with
        `weight` 0 is no target. With `Turns.last` and `Turns.each` a row ends with the answer that it trains on.

        Raises:
            UserError: the template renders a turn differently once others follow, so its tokens cannot be located.
        """
        answers = [number for number, one in enumerate(messages) if is_answer(one)]
        if self.turns is Turns.all:
            return [self._row(messages, answers, tools)]
        chosen = answers[-1:] if self.turns is Turns.last else answers
        return [self._row(messages[: number + 1], [number], tools) for number in chosen]

    def _row(self, messages: list[Message], answers: list[int], tools: list[Tool] | None) -> ChatRow:
        text = self.render(messages, False, tools)
        spans = [self._span(messages, number, text, tools) for number in answers]
        self._note_tools(text, tools)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        loss_mask = [any(begin <= start < end for begin, end in spans) for start, _ in encoding.offsets]
        ids = self._open(encoding.ids)
        return ChatRow(text, ids, [False] * (len(ids) - len(loss_mask)) + loss_mask)

    def _span(self, messages: list[Message], number: int, text: str, tools: list[Tool] | None) -> tuple[int, int]:
        """Return the start and end of an answer in `text`, in characters."""
        closed = text if number + 1 == len(messages) else self.render(messages[: number + 1], False, tools)
        if not text.startswith(closed):
            raise UserError(
                f"chat template {self.source}: writes a turn differently once others follow, so the assistant's tokens "
                "cannot be located in one row; set data.turns=each for a row an answer, or data.turns=last"
            )
        start = self._start(messages[:number], closed, tools)
        self._check_calls(messages[number], closed[start:])
        self._note_thoughts(messages[number], closed[start:])
        return start, len(closed)

    def _start(self, before: list[Message], closed: str, tools: list[Tool] | None) -> int:
        """Return the position in `closed` where decoding of its last turn begins.

        A generation prompt may open a thought that the finished turn lacks; then the turn begins where its text does.
        """
        opening = self._opening(before, tools)
        if opening is not None and closed.startswith(opening):
            return len(opening)
        probed = self.render([*before, {"role": "assistant", "content": PROBE}], False, tools)
        start = _num_shared(closed, probed)
        if opening is None:
            return start
        start = min(start, _num_shared(closed, opening))
        if before and start < _num_shared(closed, self.render(before, False, tools)):
            raise UserError(
                f"chat template {self.source}: its generation prompt is no beginning of the finished turn, so the "
                "assistant's tokens cannot be located; set data.chat_template to another one"
            )
        note(
            f"chat template {self.source}: decoding begins after {opening[start:]!r}, which finished answers lack; "
            "give their reasoning_content, or choose another opening with data.chat_template_kwargs"
        )
        return start

    def _opening(self, before: list[Message], tools: list[Tool] | None) -> str | None:
        """Return the text before an answer; None if no message comes before it and the template needs one."""
        try:
            return self.render(before, True, tools)
        except UserError:
            if before:
                raise
            return None

    def _check_calls(self, message: Message, written: str) -> None:
        """Refuse a template whose text lacks a tool call of a message."""
        for call in message.get("tool_calls", []):
            name = call["function"]["name"]
            if name not in written:
                raise UserError(
                    f"chat template {self.source}: leaves out the call of {name}; set data.chat_template to one that "
                    "writes tool_calls, such as builtin"
                )

    def _note_thoughts(self, message: Message, written: str) -> None:
        """Note a template that drops the thought of an answer."""
        thoughts = [str(message[key]).strip() for key in REASONING if message.get(key)]
        if any(thought not in written for thought in thoughts):
            note(f"chat template {self.source}: leaves out the reasoning_content of answers")

    def _note_tools(self, text: str, tools: list[Tool] | None) -> None:
        """Note a template that drops the tools of a conversation."""
        names = [str(tool.get("function", tool).get("name")) for tool in tools or []]
        if names and not any(name in text for name in names):
            note(f"chat template {self.source}: leaves out the tools of the rows")

    def _open(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids


def is_answer(message: Message) -> bool:
    """Return whether a message is a target: one of the assistant, unless its OpenAI `weight` is 0."""
    return bool(message["role"] == "assistant" and message.get("weight") != 0)


def _num_shared(left: str, right: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = zip(left, right, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def _render(template: str, messages: list[Message], tools: list[Tool] | None, named: JsonObject) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

    offered: Any = tools or None  # its type is of dictionaries or functions
    rendered: Any = render_jinja_template([messages], tools=offered, chat_template=template, **named)
    texts, _ = rendered
    return str(texts[0])


@cache
def _call_style(template: str) -> tuple[str | None, bool]:
    """Return the form of tool calls that a template writes whole, found by rendering a call.

    Templates differ: some write calls only beside the content null, others join the content to a text; some write the
    arguments as JSON, others as they are.

    Returns:
        The blank content beside calls, and whether arguments must be JSON in strings.
    """
    styles = [(content, as_strings) for content in (None, "") for as_strings in (False, True)]
    for content, as_strings in styles:
        function = {"name": "probe", "arguments": '{"key": "value"}'}
        call = {"id": "call00000", "type": "function", "function": function}
        answer: Message = {"role": "assistant", "content": content, "tool_calls": [call]}
        messages = _as_read([{"role": "user", "content": "?"}, answer], (content, as_strings))
        try:
            text = _render(template, messages, None, {"bos_token": "", "eos_token": ""})
        except FAULTS:
            continue
        # As Python prints null and objects, which no model writes.
        if "probe" in text and "None" not in text and "{'key': 'value'}" not in text:
            return content, as_strings
    return None, False


def _as_read(messages: list[Message], style: tuple[str | None, bool]) -> list[Message]:
    """Return the messages with their calls in the form that `_call_style` found."""
    content, as_strings = style
    return [
        {
            **one,
            "content": one["content"] or content,
            "tool_calls": [_with_argument(call, as_strings) for call in one["tool_calls"]],
        }
        if one.get("tool_calls")
        else one
        for one in messages
    ]


def _with_argument(call: Call, as_strings: bool) -> Call:
    arguments = call["function"]["arguments"]
    if as_strings and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_strings and isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def open_chat_template(config: DataConfig, folder: Path, tokenizer: Tokenizer, begin: list[int]) -> ChatTemplate | None:
    """Return the template of the user's file, else the tokenizer's own, else None.

    Args:
        config: its `chat_template` is a file or `builtin`; also the template's variables and the turns to train on.
        folder: the tokenizer's folder, with chat_template.jinja or a `chat_template` in tokenizer_config.json.
        tokenizer: the backbone's.
        begin: ids that open every training document.

    Raises:
        UserError: a file cannot be read.
    """
    settings = _tokenizer_settings(folder / "tokenizer_config.json")
    path = config.chat_template
    source = (
        Path(__file__).with_name("builtin.jinja") if path == BUILTIN else Path(path or folder / "chat_template.jinja")
    )
    text: str | None
    if path or source.is_file():
        text = _read(source, "data.chat_template" if path else "backbone.path")
    else:
        source = folder / "tokenizer_config.json"
        text = _stored_template(settings.get("chat_template"))
    if path and not str(text).strip():
        raise UserError(f"data.chat_template={path}: is empty; give a jinja template")
    if not text:
        return None
    named = {name: value for name, value in settings.items() if name.endswith("_token") and value}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    words = {name: value for name, value in special.items() if isinstance(value, str)}
    # The copy reads special tokens in a text as such: tokenizer.json does not store `encode_special_tokens`.
    copy = Tokenizer.from_str(tokenizer.to_str())
    return ChatTemplate(text, source, words, copy, begin, config.chat_template_kwargs, config.turns)


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path}: cannot be read ({error}); give a jinja template in UTF-8") from None


def _tokenizer_settings(path: Path) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(_read(path, "backbone.path")))
    except ValueError as error:
        raise UserError(f"backbone.path={path}: is not JSON ({error}); restore the file") from None


def _stored_template(stored: Any) -> str | None:
    """Return the template of tokenizer_config.json; of several named ones, `default`."""
    if isinstance(stored, list):
        stored = {one.get("name"): one.get("template") for one in stored}.get("default")
    return stored if isinstance(stored, str) else None
