"""Messages and tools of a conversation in OpenAI's form, which chat templates read."""

from __future__ import annotations

import json
from typing import Any

from mtptrain.data.documents import Call, Message, Tool
from mtptrain.errors import UserError

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")


def check_text(where: str, key: str, value: Any) -> str:
    """Return `value`, the text of a row, unless it is empty or no text.

    Args:
        where: file and line, for the error.
        key: key of the value in its row, for the error.
        value: the value.

    Raises:
        UserError: the value is no text, or blank.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must hold text, not {type(value).__name__}; see docs/data.md")
    if not value.strip():
        raise UserError(f"{where}: `{key}` is empty; write a text or drop the line")
    return value


def parse_json(where: str, key: str, value: Any) -> Any:
    """Return a value of a row, parsed if it is JSON in a string; a blank string is None.

    Raises:
        UserError: a string is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{where}: `{key}` is a string that is not JSON ({error}); mend or drop it") from None


def read_messages(where: str, value: list[Any]) -> list[Message]:
    """Return the messages of a row with all their keys, contents as text and tool calls in OpenAI's form.

    Keys that hold null are left out, since a parquet file has every key in every message. Parts of a content are
    joined by line breaks.

    Args:
        where: file and line, for the error.
        value: the messages.

    Raises:
        UserError: a message lacks a role or says nothing, or has content or calls of an unknown form.
    """
    return [_message(where, one) for one in value]


def _message(where: str, source: Any) -> Message:
    if not isinstance(source, dict) or not isinstance(source.get("role"), str) or not source["role"].strip():
        raise UserError(f"{where}: each of `messages` must have a role and a content; see docs/data.md")
    message = {key: value for key, value in source.items() if value is not None}
    if message["role"] == "function":  # OpenAI's name before there were tools
        message["role"] = "tool"
    calls = read_calls(where, message.pop("tool_calls", None)) + read_calls(where, message.pop("function_call", None))
    if calls:
        message["tool_calls"] = calls
    message["content"] = _content(where, message)
    return message


def _content(where: str, message: Message) -> str | None:
    """Return the content as text; it may be blank beside calls or a thought, and in the messages of systems and tools.

    It is None only beside calls, which some templates write only then.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(where, one) for one in content)
    if content is None and "tool_calls" in message:
        return None
    has_thought = any(message.get(key) for key in REASONING)
    if content is None and (has_thought or message["role"] == "tool"):
        return ""
    may_be_blank = "tool_calls" in message or has_thought or message["role"] not in ("user", "assistant")
    if isinstance(content, str) and may_be_blank:
        return content
    return check_text(where, "messages", content)


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(f"{where}: `content` has a part of type {kind}; only text can be trained on, so drop the row")


def read_calls(where: str, value: Any) -> list[Call]:
    """Return tool calls in OpenAI's form.

    Args:
        where: file and line, for the error.
        value: a call or a list of calls, perhaps as JSON in a string; `function` around name and arguments may be
            missing. None = no call.

    Raises:
        UserError: a call has no name, or arguments in a string that are not JSON.
    """
    value = parse_json(where, "tool_calls", value)
    calls = value if isinstance(value, list) else [value] if value else []
    return [_call(where, parse_json(where, "tool_calls", one)) for one in calls]


def _call(where: str, call: Any) -> Call:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise UserError(f"{where}: each of `tool_calls` must have a function with a name; see docs/data.md")
    arguments = function.get("arguments")
    if parse_json(where, "arguments", arguments) is None:
        arguments = {}
    outer = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    kept = {key: value for key, value in outer.items() if value is not None}
    return {"type": "function", **kept, "function": {"name": function["name"], "arguments": arguments}}


def read_tools(where: str, value: Any) -> list[Tool]:
    """Return tools in OpenAI's form.

    Args:
        where: file and line, for the error.
        value: a tool or a list of tools, perhaps as JSON in strings, each a function's schema with or without
            `{"type": "function", "function": ...}` around it. None = no tool.

    Raises:
        UserError: a tool is no schema.
    """
    value = parse_json(where, "tools", value)
    tools = value if isinstance(value, list) else [value] if value else []
    return [_tool(where, parse_json(where, "tools", one)) for one in tools]


def _tool(where: str, tool: Any) -> Tool:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        schema = {key: value for key, value in tool.items() if key != "type" and value is not None}
        return {"type": "function", "function": schema}
    raise UserError(f"{where}: each of `tools` must be a function's JSON schema with a name; see docs/data.md")
