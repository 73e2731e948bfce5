"""Conversations as rows of a file hold them, checked."""

from __future__ import annotations

from typing import Any

from mtptrain.errors import UserError

Message = dict[str, str]  # `role` and `content`


def check_text(where: str, key: str, value: Any) -> str:
    """A row's text, which must be one and say something.

    Args:
        where: file and line, for the error.
        key: of the row.
        value: what the row has there.

    Raises:
        UserError: it is no text, or empty.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must hold text, not {type(value).__name__}; see docs/prompts.md")
    if not value.strip():
        raise UserError(f"{where}: `{key}` is empty; write a text or drop the line")
    return value


def check_messages(where: str, value: list[Any]) -> list[Message]:
    """The messages of a row, each with a role and a text; what else one has is left out.

    Raises:
        UserError: one is of another form.
    """
    messages = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise UserError(f"{where}: each of `messages` must have a role and a content; see docs/prompts.md")
        messages.append({"role": one["role"], "content": check_text(where, "messages", one.get("content"))})
    return messages
