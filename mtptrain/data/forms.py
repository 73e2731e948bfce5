"""Forms of rows: plain text, and the usual forms of conversations, recognised by their columns."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from mtptrain.config import DataFormat
from mtptrain.data.documents import Message, Tool
from mtptrain.data.files import Row
from mtptrain.data.messages import check_text, parse_json, read_calls, read_messages, read_tools
from mtptrain.errors import UserError

LIST_COLUMNS = ("messages", "conversations", "conversation")  # hold a list of messages, perhaps as JSON in a string
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALLS = ("function_call", "tool_call")


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a row.

    Attributes:
        form: the form it was read as.
        text: a text; empty for a conversation.
        messages: a conversation; empty for a text.
        tools: the functions that the conversation's assistant may call.
    """

    form: DataFormat
    text: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)


def recognise(row: Row, column: str, names: Collection[str] | None = None) -> DataFormat | None:
    """Return the form of a row by its columns; None if it has no known form.

    Args:
        row: the row.
        column: `data.field_name`, which counts before all others.
        names: columns that count; None = those that do not hold null.
    """
    names = [name for name, value in row.items() if value is not None] if names is None else names
    if column not in LIST_COLUMNS and isinstance(row.get(column), str):
        return DataFormat.text
    for name in (column, *LIST_COLUMNS):
        items = _items(row.get(name), name)
        if items is not None:
            is_sharegpt = any(isinstance(one, dict) and "from" in one and "role" not in one for one in items)
            return DataFormat.sharegpt if is_sharegpt else DataFormat.messages
    if "prompt" in names and "completion" in names:
        return DataFormat.prompt_completion
    return DataFormat.alpaca if "instruction" in names and "output" in names else None


def _items(value: Any, column: str) -> list[Any] | None:
    """Return the messages of a column; None if it holds no list."""
    if isinstance(value, str) and column in LIST_COLUMNS:
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        # `datasets` stores a sequence of structs as a struct of sequences.
        return [dict(zip(value, ones, strict=False)) for ones in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else None


def read_content(where: str, row: Row, column: str, form: DataFormat) -> Content:
    """Return the content of a row.

    Args:
        where: file and row, for errors.
        row: the row.
        column: `data.field_name`.
        form: `data.format`.

    Raises:
        UserError: the row has no known form, or does not keep to its form.
    """
    if form is DataFormat.auto:
        form = _recognised(where, row, column)
    if form is DataFormat.text:
        return Content(form, _text(where, row, column))
    return read_conversation(where, row, column, form)


def read_conversation(where: str, row: Row, column: str, form: DataFormat) -> Content:
    """Return the content of a row that is a conversation in the form given; arguments and errors of `read_content`."""
    messages = _with_system(where, row, READERS[form](where, row, column))
    return Content(form, "", messages, read_tools(where, row.get("tools") or row.get("functions")))


def _recognised(where: str, row: Row, column: str) -> DataFormat:
    form = recognise(row, column)
    if form is None:
        _refuse_null(where, row, column)
        if column in LIST_COLUMNS:
            parse_json(where, column, row.get(column))
        form = recognise(row, column, row)  # the reader of the form names the column that holds null
    if form is None:
        raise _no_text(where, row, column)
    return form


def _text(where: str, row: Row, column: str) -> str:
    text = row.get(column)
    _refuse_null(where, row, column)
    if not isinstance(text, str):
        raise _no_text(where, row, column)
    return text


def _no_text(where: str, row: Row, column: str) -> UserError:
    """Return the error for a row without a text in the column."""
    holds = f"holds a value of type {type(row[column]).__name__}, no text," if column in row else "has no text"
    of_that_name = "under that name" if column in row else "of that name"
    return UserError(f"data.field_name={column}: {where} {holds} {of_that_name}; {describe_columns(row)}")


def _refuse_null(where: str, row: Row, column: str) -> None:
    if column in row and row[column] is None:
        raise UserError(f"{where}: `{column}` is null; write a text or drop the row")


def describe_columns(row: Row) -> str:
    """Return the columns of a row and the ways out, for an error."""
    return (
        f"it has {sorted(map(str, row))}; set data.field_name to the column that holds the text, or the list of "
        "messages; docs/data.md lists the forms of conversations"
    )


def _list_of(where: str, row: Row, column: str) -> list[Any]:
    """Return the messages of the first column that holds some."""
    name = next((name for name in (column, *LIST_COLUMNS) if row.get(name) is not None), column)
    items = _items(row.get(name), name)
    if items is None:
        parse_json(where, name, row.get(name))
        raise UserError(f"{where}: `{name}` must be a list of messages; {describe_columns(row)}")
    return items


def _openai(where: str, row: Row, column: str) -> list[Message]:
    return read_messages(where, _list_of(where, row, column))


def _sharegpt(where: str, row: Row, column: str) -> list[Message]:
    return read_messages(where, [_sharegpt_message(where, one) for one in _list_of(where, row, column)])


def _sharegpt_message(where: str, item: Any) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("from"), str):
        raise UserError(f"{where}: each of `conversations` must have `from` and `value`; see docs/data.md")
    name = item["from"].strip().lower()
    if name not in ROLES:
        raise UserError(f"{where}: `from` is {item['from']!r}, and must be one of {', '.join(ROLES)}")
    message = {key: value for key, value in item.items() if key not in ("from", "value")}
    if name in CALLS:
        return {**message, "role": "assistant", "tool_calls": read_calls(where, item.get("value"))}
    return {**message, "role": ROLES[name], "content": item.get("value")}


def _prompt_completion(where: str, row: Row, column: str) -> list[Message]:
    messages: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(name)
        messages += value if isinstance(value, list) else [_turn(where, role, name, value)]
    return read_messages(where, messages)


def _alpaca(where: str, row: Row, column: str) -> list[Message]:
    messages = []
    for turn in parse_json(where, "history", row.get("history")) or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UserError(f"{where}: each of `history` must be an instruction and its output; see docs/data.md")
        messages += [
            _turn(where, role, "history", text) for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    parts = [check_text(where, name, row[name]) for name in ("instruction", "input") if not _is_blank(row.get(name))]
    messages.append(_turn(where, "user", "instruction", "\n".join(parts) if parts else row.get("instruction")))
    return [*messages, _turn(where, "assistant", "output", row.get("output"))]


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _turn(where: str, role: str, name: str, value: Any) -> Message:
    return {"role": role, "content": check_text(where, name, value)}


def _with_system(where: str, row: Row, messages: list[Message]) -> list[Message]:
    """Return the messages after the text of the column `system`, if the row has one.

    Raises:
        UserError: the messages begin with another system message.
    """
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise UserError(f"{where}: `system` differs from the conversation's own system message; drop one of them")
        return messages
    return [{"role": "system", "content": system}, *messages]


READERS = {
    DataFormat.messages: _openai,
    DataFormat.sharegpt: _sharegpt,
    DataFormat.prompt_completion: _prompt_completion,
    DataFormat.alpaca: _alpaca,
}
