"""Conversations as text and tokens, through the chat template of a tokenizer, and which tokens are the assistant's."""

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
        source: the file it came from.
        special_tokens: what the template may name, e.g. `bos_token`.
        tokenizer: reads the marks that the template writes as marks. A mark spelt out in a message is one too.
        begin: ids that open every training document; put before a text that the template does not open with them.
    """

    text: str
    source: Path
    special_tokens: dict[str, str]
    tokenizer: Tokenizer
    begin: list[int]

    @property
    def sha256(self) -> str:
        """Hash of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: list[Message], asks: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: from the first on.
            asks: end where the assistant begins to speak, instead of after the last message.

        Raises:
            UserError: the template refuses the messages or is broken.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

        named: dict[str, Any] = dict(self.special_tokens)
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=asks, **named
            )
        except (TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"chat template {self.source}: cannot render a conversation ({reason}); mend it") from None
        texts, _ = rendered
        return str(texts[0])

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins to speak."""
        return self._open(self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def encode_with_mask(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and of each whether the assistant speaks it.

        A message is loss_mask from the end of its opening, where decoding would begin, through its closing mark.

        Raises:
            UserError: the template writes an earlier part differently once more follows, so that it cannot be told.
        """
        text = self.render(messages, asks=False)
        spans = [self._span(messages, i, text) for i, one in enumerate(messages) if one["role"] == "assistant"]
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        loss_mask = [any(begin <= start < end for begin, end in spans) for start, _ in encoding.offsets]
        ids = self._open(encoding.ids)
        return ids, [False] * (len(ids) - len(loss_mask)) + loss_mask

    def _span(self, messages: list[Message], index: int, text: str) -> tuple[int, int]:
        """Characters of `text` that message `index` speaks."""
        opening, closed = self.render(messages[:index]), self.render(messages[: index + 1], asks=False)
        if not (text.startswith(closed) and closed.startswith(opening)):
            raise UserError(
                f"chat template {self.source}: writes a turn differently once others follow, so the assistant's tokens "
                "cannot be told; set data.chat_template to one that only appends"
            )
        return len(opening), len(closed)

    def _open(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids


def open_chat_template(path: str | None, folder: Path, tokenizer: Tokenizer, begin: list[int]) -> ChatTemplate | None:
    """The template of the file that the user named, else the one that came with the tokenizer, else None.

    Args:
        path: `data.chat_template`.
        folder: of the tokenizer: chat_template.jinja, or the `chat_template` of tokenizer_config.json.
        tokenizer: of the backbone.
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
    # A copy: of its settings, that marks in a text are characters is the one that is not stored.
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
    """The template of tokenizer_config.json, which may hold several under names."""
    if isinstance(stored, list):
        stored = {one.get("name"): one.get("template") for one in stored}.get("default")
    return stored if isinstance(stored, str) else None
