"""Rows of every form of conversations, in the spellings that data sets use."""

import json
from typing import Any

import pytest

from mtptrain.config import DataFormat
from mtptrain.data.forms import Content, read_content, recognise
from mtptrain.errors import UserError

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def content_of(row: dict[str, Any], column: str = "messages", form: str = "auto") -> Content:
    return read_content("F, row 7", row, column, DataFormat(form))


def shown(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"messages": json.dumps([USER, ANSWER])}, "messages"),
        ({"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."]}}, "messages"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"text": None, "messages": [USER, ANSWER]}, "messages"),
        ({"conversations": shown(("human", "Why?"), ("gpt", "Because."))}, "sharegpt"),
        ({"conversation": shown(("user", "Why?"), ("assistant", "Because.")), "id": 3}, "sharegpt"),
        ({"messages": None, "conversations": json.dumps(shown(("human", "Why?"), ("gpt", "Because.")))}, "sharegpt"),
        ({"prompt": "Why?", "completion": "Because."}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"prompt": [USER], "completion": "Because."}, "prompt_completion"),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca"),
        ({"instruction": "Why?", "input": None, "output": "Because."}, "alpaca"),
        ({"instruction": "Why?", "output": "Because."}, "alpaca"),
        ({"instruction": "", "input": "Why?", "output": "Because."}, "alpaca"),
    ],
)
@pytest.mark.parametrize("column", ["text", "messages"])
def test_a_form_is_recognised_by_its_columns(row: dict[str, Any], form: str, column: str) -> None:
    content = content_of(row, column)
    assert content.form.value == form
    assert content.messages == [USER, ANSWER]
    assert content == content_of(row, column, form)


def test_a_column_that_is_named_counts_before_all_others() -> None:
    row = {"text": "a", "messages": [USER, ANSWER], "dialogue": shown(("human", "Why?"), ("gpt", "Because."))}
    assert content_of(row, "text") == Content(DataFormat.text, "a")
    assert content_of(row, "dialogue").form is DataFormat.sharegpt
    assert recognise({"prompt": "a"}, "prompt") is DataFormat.text


def test_keys_of_a_message_are_kept_but_for_nulls() -> None:
    message = {**ANSWER, "reasoning_content": "so", "name": "ada", "tool_calls": None}
    (_, answer) = content_of({"messages": [USER, message]}).messages
    assert answer == {**ANSWER, "reasoning_content": "so", "name": "ada"}


@pytest.mark.parametrize(
    "content", ["a\nb", [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}], ["a", "b"]]
)
def test_parts_of_a_content_are_lines_of_a_text(content: object) -> None:
    assert content_of({"messages": [{"role": "user", "content": content}, ANSWER]}).messages[0]["content"] == "a\nb"


FUNCTION = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("given", "call"),
    [
        ({"tool_calls": [{"id": "1", **CALL}]}, {"id": "1", **CALL}),
        ({"tool_calls": [{"id": None, **CALL}]}, CALL),
        ({"tool_calls": [FUNCTION]}, CALL),
        ({"tool_calls": json.dumps([CALL])}, CALL),
        ({"tool_calls": [json.dumps(CALL)]}, CALL),
        ({"function_call": FUNCTION}, CALL),
        ({"tool_calls": [{"function": {"name": "weather", "arguments": {"a": None}}}]}, {"a": None}),
        ({"tool_calls": [{"function": {"name": "weather", "arguments": None}}]}, {}),
        ({"tool_calls": [{"function": {"name": "weather", "arguments": ""}}]}, {}),
        ({"tool_calls": [{"function": {"name": "weather"}}]}, {}),
    ],
)
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}, {"content": []}])
def test_a_call_is_read_in_every_spelling_and_beside_no_content(
    given: dict[str, Any], call: dict[str, Any], content: dict[str, Any]
) -> None:
    (answer,) = content_of({"messages": [{"role": "assistant", **content, **given}]}).messages
    wanted = call if "function" in call else {**CALL, "function": {"name": "weather", "arguments": call}}
    assert answer["tool_calls"] == [wanted]
    assert not answer["content"]


@pytest.mark.parametrize(
    "tools", [[TOOL], [SCHEMA], json.dumps([SCHEMA]), [json.dumps(TOOL)], TOOL, {"type": "function", **SCHEMA}]
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_are_read_in_every_spelling(tools: object, column: str) -> None:
    assert content_of({"messages": [USER, ANSWER], column: tools}).tools == [TOOL]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "reasoning_content": "so"},
        {"role": "tool", "content": None},
        {"role": "tool", "content": ""},
        {"role": "system", "content": ""},
    ],
)
def test_a_message_that_says_something_else_or_answers_nobody_may_be_blank(message: dict[str, Any]) -> None:
    assert content_of({"messages": [message]}).messages == [{**message, "content": ""}]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools: object) -> None:
    assert content_of({"messages": [USER, ANSWER], "tools": tools}).tools == []


@pytest.mark.parametrize("name", ["function_call", "tool_call"])
@pytest.mark.parametrize("result", ["observation", "tool", "function_response"])
def test_sharegpt_calls_and_their_results_are_messages(name: str, result: str) -> None:
    talk = shown(("human", "Rain?"), (name, json.dumps(FUNCTION)), (result, "no"), ("GPT ", "No."))
    content = content_of({"conversations": talk, "tools": json.dumps([SCHEMA]), "system": "Be short."})
    assert [one["role"] for one in content.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert content.messages[2]["tool_calls"] == [CALL]
    assert content.tools == [TOOL]


def test_alpaca_has_a_system_text_an_input_and_a_history() -> None:
    row = {"system": "S", "history": [["q", "a"]], "instruction": "Sum up.", "input": "Long.", "output": "Short."}
    assert [one["content"] for one in content_of(row).messages] == ["S", "q", "a", "Sum up.\nLong.", "Short."]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{**USER, "content": None}]}, "`messages` must hold text, not NoneType"),
        ({"messages": [{**ANSWER, "content": " "}]}, "`messages` is empty"),
        ({"messages": [{"content": "Why?"}]}, "each of `messages` must have a role"),
        ({"messages": ["Why?"]}, "each of `messages` must have a role"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]}, "a part of type image_url"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "must have a function with a name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "`arguments` is a string that is not JSON",
        ),
        ({"messages": "Why?"}, "`messages` is a string that is not JSON"),
        ({"messages": None}, "`messages` is null"),
        ({"conversations": shown(("alien", "Why?"))}, "`from` is 'alien', and must be one of system,"),
        ({"conversations": [{"from": "human"}]}, "`messages` must hold text, not NoneType"),
        ({"prompt": "Why?", "completion": None}, "`completion` must hold text, not NoneType"),
        ({"instruction": "Why?", "input": 3, "output": "Because."}, "`input` must hold text, not int"),
        ({"instruction": 3, "input": "Why?", "output": "Because."}, "`instruction` must hold text, not int"),
        ({"instruction": "Why?", "output": ""}, "`output` is empty"),
        ({"messages": [USER, ANSWER], "tools": "weather"}, "`tools` is a string that is not JSON"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "each of `tools` must be"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, ANSWER]}, "`system` differs"),
        ({"other": "Why?"}, r"has no text of that name; it has \['other'\]; set data.field_name"),
    ],
)
def test_a_row_that_keeps_to_no_form_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=rf"F, row 7.*{reason}"):
        content_of(row)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("text", "holds a value of type list, no text, under that name"),
        ("sharegpt", "each of `conversations` must have `from` and `value`"),
        ("prompt_completion", "`prompt` must hold text, not NoneType"),
        ("alpaca", "`instruction` must hold text, not NoneType"),
    ],
)
def test_a_form_that_is_set_is_kept_to(form: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        content_of({"messages": [USER, ANSWER]}, form=form)
