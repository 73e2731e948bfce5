"""Conversations as text and tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mtptrain.config import DataConfig, Turns
from mtptrain.data.chat import ChatRow, ChatTemplate, open_chat_template
from mtptrain.data.documents import Message
from mtptrain.data.tokenizer import BOS, EOS, read_special_tokens_as_text, save_tokenizer, train_tokenizer
from mtptrain.errors import UserError
from tests.conftest import CHAT_TEMPLATE, corpus_texts

TOKENIZER = train_tokenizer(corpus_texts(), 300)
CHAT: list[Message] = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Nothing at all."},
]


def write_folder(folder: Path, **settings: object) -> Path:
    save_tokenizer(TOKENIZER, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    return folder


def template_of(folder: Path, text: str = CHAT_TEMPLATE) -> ChatTemplate:
    template = open_chat_template(DataConfig(), write_folder(folder, chat_template=text), TOKENIZER, [0])
    assert template is not None
    return template


def row_of(chat: ChatTemplate, messages: list[Message]) -> ChatRow:
    (row,) = chat.encode_rows(messages)
    return row


def targets_of(row: ChatRow) -> str:
    """Return the text of a row's targets."""
    return str(
        TOKENIZER.decode([token for token, is_target in zip(row.tokens, row.loss_mask, strict=True) if is_target])
    )


def test_a_conversation_is_rendered_up_to_the_opening_of_an_answer(tmp_path: Path) -> None:
    text = template_of(tmp_path).render(CHAT[:3])
    assert text == f"{BOS}<user>Why?</user><assistant>Because.</assistant><user>And then?</user><assistant>"


def test_the_loss_mask_covers_the_assistants_words_and_closing_tokens(tmp_path: Path) -> None:
    assert targets_of(row_of(template_of(tmp_path), CHAT)) == "Because.</assistant>Nothing at all.</assistant>"


def test_a_conversation_begins_with_the_tokens_of_its_prompt(tmp_path: Path) -> None:
    chat = template_of(tmp_path)
    prompt = chat.encode(CHAT[:3])
    assert row_of(chat, CHAT).tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("opens", [True, False])
def test_a_conversation_has_the_bos_token_once(opens: bool, tmp_path: Path) -> None:
    text = CHAT_TEMPLATE if opens else CHAT_TEMPLATE.replace("{{- bos_token -}}", "")
    chat = template_of(tmp_path, text)
    row = row_of(chat, CHAT)
    for ids in (row.tokens, chat.encode(CHAT[:1])):
        assert (ids[0], ids.count(0)) == (0, 1)
    assert (len(row.loss_mask), row.loss_mask[0]) == (len(row.tokens), False)


def test_special_tokens_of_a_template_do_not_change_how_documents_are_encoded(tmp_path: Path) -> None:
    tokenizer = read_special_tokens_as_text(Tokenizer.from_str(TOKENIZER.to_str()))
    chat = open_chat_template(DataConfig(), write_folder(tmp_path, chat_template=f"a{EOS}"), tokenizer, [])
    assert chat is not None
    assert chat.encode(CHAT)[-1] == 1
    assert 1 not in tokenizer.encode(f"a{EOS}", add_special_tokens=False).ids


@pytest.mark.parametrize("stored", [["tool", "T"], ["default", "D"], None])
def test_of_several_stored_templates_the_default_counts(stored: list[str] | None, tmp_path: Path) -> None:
    templates = [{"name": "other", "template": "O"}]
    if stored is not None:
        templates.append(dict(zip(["name", "template"], stored, strict=True)))
    template = open_chat_template(DataConfig(), write_folder(tmp_path, chat_template=templates), TOKENIZER, [])
    assert (template and template.text) == ("D" if stored == ["default", "D"] else None)


def test_a_file_of_the_user_counts_before_the_tokenizers_own(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="from config")
    (tmp_path / "chat_template.jinja").write_text("from folder", encoding="utf-8")
    (tmp_path / "user.jinja").write_text("from user", encoding="utf-8")
    stored, chosen = (
        open_chat_template(DataConfig(chat_template=path), tmp_path, TOKENIZER, [])
        for path in (None, f"{tmp_path}/user.jinja")
    )
    assert stored is not None
    assert chosen is not None
    assert (stored.text, chosen.text) == ("from folder", "from user")
    assert stored.sha256 != chosen.sha256


@pytest.mark.parametrize("text", ["{% if %}", "{{ raise_exception('no system message') }}"])
def test_a_template_that_cannot_render_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat template .*tokenizer_config.json: cannot render .*; mend it"):
        template_of(tmp_path, text).render(CHAT)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    chat = template_of(tmp_path, "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="writes a turn differently once others follow"):
        chat.encode_rows(CHAT)


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
WITH_CALL: list[Message] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "No rain."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
THOUGHTS: list[Message] = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "One.", "reasoning_content": "first"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "second"},
]
# Earlier answers lose their thoughts, as with most templates of models that think.
LAST_THOUGHT = (
    "{%- for m in messages -%}{{- '<' + m.role + '>' -}}{%- if m.role == 'assistant' and loop.last -%}"
    "{{- '<think>' + m.reasoning_content + '</think>' -}}{%- endif -%}{{- m.content + '</>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant><think>' -}}{%- endif -%}"
)
CALLS = "{%- for m in messages -%}<{{ m.role }}>HOW{%- for c in m.tool_calls or [] -%}{%- set f = c.function -%}"
CALLS += "[{{ f.name }} WHAT]{%- endfor -%}</>{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"


def builtin(folder: Path, **settings: Any) -> ChatTemplate:
    config = DataConfig(chat_template="builtin", **settings)
    template = open_chat_template(config, write_folder(folder), TOKENIZER, [0])
    assert template is not None
    return template


def test_calls_are_the_assistants_and_tools_reach_the_template(tmp_path: Path) -> None:
    (row,) = builtin(tmp_path).encode_rows(WITH_CALL, TOOLS)
    assert '"description": "of a city"' in row.text
    call = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>\n</assistant>\n'
    assert targets_of(row) == f"{call}No rain.\n</assistant>\n"


@pytest.mark.parametrize(
    "how",
    [
        "{{ m.content or '' }}",
        "{{ '' + m.content }}",
        "{{ m.content }}",
        "{%- if m.content is not none -%}{{ m.content }}{%- set m = {} -%}{%- endif -%}",
    ],
    ids=["either", "joined to a text", "written as it is", "null only"],
)
@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("{{ f.arguments | tojson }}", '{"city": "Paris"}'),
        ("{{ '' + f.arguments }}", '{"city":"Paris"}'),
        ("{{ f.arguments }}", '{"city":"Paris"}'),
    ],
    ids=["as JSON", "joined to a text", "written as they are"],
)
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_is_written_whole_by_templates_of_every_style(
    how: str, what: str, arguments: str, content: str | None, tmp_path: Path
) -> None:
    chat = template_of(tmp_path, CALLS.replace("HOW", how).replace("WHAT", what))
    row = row_of(chat, [WITH_CALL[0], {**WITH_CALL[1], "content": content}])
    assert targets_of(row) == f"[weather {arguments}]</>"


def test_a_template_that_drops_calls_is_refused(tmp_path: Path) -> None:
    chat = template_of(tmp_path, CHAT_TEMPLATE.replace("message.content", "(message.content or '')"))
    with pytest.raises(UserError, match=r"leaves out the call of weather; set data\.chat_template"):
        chat.encode_rows(WITH_CALL)


@pytest.mark.parametrize(
    ("turns", "targets"),
    [("last", ["second</think>Two.</>"]), ("each", ["first</think>One.</>", "second</think>Two.</>"])],
)
def test_thoughts_that_only_the_last_answer_keeps_are_trained_on_in_rows_of_their_own(
    turns: str, targets: list[str], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, chat_template=LAST_THOUGHT)
    chat = open_chat_template(DataConfig(turns=Turns(turns)), folder, TOKENIZER, [0])
    assert chat is not None
    rows = chat.encode_rows(THOUGHTS)
    assert [targets_of(row) for row in rows] == targets
    for row, number in zip(rows, {"last": [3], "each": [1, 3]}[turns], strict=True):
        prompt = chat.encode(THOUGHTS[:number])
        assert row.tokens[: len(prompt)] == prompt
        assert not any(row.loss_mask[: len(prompt)])


def test_all_turns_in_one_row_are_refused_with_the_way_out_if_thoughts_are_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writes a turn differently once others follow.*; set data\.turns=each"):
        template_of(tmp_path, LAST_THOUGHT).encode_rows(THOUGHTS)


@pytest.mark.parametrize("content", ["Because.", "<tall> tale", "<think>\nso"])
def test_an_answer_without_the_thought_that_its_opening_begins_counts_whole(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CHAT_TEMPLATE.replace("{{- '<assistant>' -}}", "{{- '<assistant><think>\n' -}}")
    row = row_of(template_of(tmp_path, text), [CHAT[0], {"role": "assistant", "content": content}])
    assert targets_of(row) == content.removeprefix("<think>\n") + "</assistant>"
    assert ("decoding begins after" in capsys.readouterr().err) == (not content.startswith("<think>\n"))


def test_an_opening_that_is_no_beginning_of_a_finished_turn_is_refused(tmp_path: Path) -> None:
    text = CHAT_TEMPLATE.replace("{{- bos_token -}}", "{{- 'open' if add_generation_prompt else 'done' -}}")
    with pytest.raises(UserError, match="its generation prompt is no beginning of the finished turn"):
        template_of(tmp_path, text).encode_rows(CHAT)


def test_a_conversation_may_begin_with_the_assistant_in_a_template_that_needs_a_message(tmp_path: Path) -> None:
    text = "{%- if messages[0]['role'] == 'system' -%}!{%- endif -%}" + CHAT_TEMPLATE
    assert targets_of(row_of(template_of(tmp_path, text), CHAT[1:2])) == "Because.</assistant>"


@pytest.mark.parametrize(("enable_thinking", "opening"), [(True, "<think>\n"), (False, ""), (None, "")])
def test_variables_of_the_template_reach_training_rows_and_prompts(
    enable_thinking: bool | None, opening: str, tmp_path: Path
) -> None:
    settings = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    chat = builtin(tmp_path, chat_template_kwargs=settings)
    assert chat.render(THOUGHTS[:1]).endswith(f"<assistant>\n{opening}")
    assert ("first" in row_of(chat, THOUGHTS).text) == (enable_thinking is not False)
    assert (chat.sha256 == builtin(tmp_path).sha256) == (enable_thinking is None)


def test_an_answer_of_weight_0_is_no_target(tmp_path: Path) -> None:
    messages = [*CHAT[:1], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    assert targets_of(row_of(template_of(tmp_path), messages)) == "Nothing at all.</assistant>"


def test_variables_that_mtptrain_sets_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs=\[messages\]"):
        DataConfig(chat_template_kwargs={"messages": []})
