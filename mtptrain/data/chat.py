"""Conversations as text and tokens, through a chat template, with a mask of the assistant's tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from mtptrain.data.documents import Message
from mtptrain.errors import UserError


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Renders and encodes conversations.

    Attributes:
        text: the jinja template.
        source: the template's file.
        special_tokens: special tokens by the name that the template uses, e.g. `bos_token`.
        tokenizer: encodes special tokens in rendered text as such, also those spelt out in a message.
        begin: ids that open every training document; prepended unless the template writes them.
    """

    text: str
    source: Path
    special_tokens: dict[str, str]
    tokenizer: Tokenizer
    begin: list[int]

    @property
    def sha256(self) -> str:
        """SHA-256 of the template's text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation.

        Args:
            messages: all messages so far.
            add_generation_prompt: end with the opening of an assistant message instead of after the last message.

        Raises:
            UserError: the template rejects the messages or is broken.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

        named: dict[str, Any] = dict(self.special_tokens)
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=add_generation_prompt, **named
            )
        except (TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"chat template {self.source}: cannot render a conversation ({reason}); mend it") from None
        texts, _ = rendered
        return str(texts[0])

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the token ids of a conversation that ends with the opening of an assistant message."""
        return self._open(self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def encode_with_mask(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Return the token ids of a whole conversation and its loss mask: True for the assistant's tokens.

        An assistant message counts from the end of its opening, where decoding would begin, through its closing token.

        Raises:
            UserError: the template renders a turn differently once others follow, so its tokens cannot be located.
        """
        text = self.render(messages, add_generation_prompt=False)
        spans = [self._span(messages, i, text) for i, one in enumerate(messages) if one["role"] == "assistant"]
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        loss_mask = [any(begin <= start < end for begin, end in spans) for start, _ in encoding.offsets]
        ids = self._open(encoding.ids)
        return ids, [False] * (len(ids) - len(loss_mask)) + loss_mask

    def _span(self, messages: list[Message], index: int, text: str) -> tuple[int, int]:
        """Return the start and end of message `index` in `text`, in characters."""
        opening = self.render(messages[:index])
        closed = self.render(messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(closed) and closed.startswith(opening)):
            raise UserError(
                f"chat template {self.source}: writes a turn differently once others follow, so the assistant's tokens "
                "cannot be located; set data.chat_template to one that only appends"
            )
        return len(opening), len(closed)

    def _open(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids


def open_chat_template(path: str | None, folder: Path, tokenizer: Tokenizer, begin: list[int]) -> ChatTemplate | None:
    """Return the template of the user's file, else the tokenizer's own, else None.

    Args:
        path: `data.chat_template`.
        folder: the tokenizer's folder, with chat_template.jinja or a `chat_template` in tokenizer_config.json.
        tokenizer: the backbone's.
        begin: ids that open every training document.

    Raises:
        UserError: a file cannot be read.
    """
    settings = _tokenizer_settings(folder / "tokenizer_config.json")
    source = Path(path) if path else folder / "chat_template.jinja"
    text: str | None
    if path or source.is_file():
        text = _read(source, "data.chat_template" if path else "backbone.path")
    else:
        source = folder / "tokenizer_config.json"
        text = _stored_template(settings.get("chat_template"))
    if not text:
        return None
    named = {name: value for name, value in settings.items() if name.endswith("_token") and value}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    words = {name: value for name, value in special.items() if isinstance(value, str)}
    # The copy reads special tokens in a text as such: tokenizer.json does not store `encode_special_tokens`.
    return ChatTemplate(text, source, words, Tokenizer.from_str(tokenizer.to_str()), begin)


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path}: cannot be read ({error}); give a jinja template in UTF-8") from None


def _tokenizer_settings(path: Path) -> dict[str, Any]:
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
