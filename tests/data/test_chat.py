"""Conversations as text and tokens."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mtptrain.data.chat import ChatTemplate, open_chat_template
from mtptrain.data.tokenizer import BOS, EOS, read_special_tokens_as_text, save_tokenizer, train_tokenizer
from mtptrain.errors import UserError
from tests.conftest import CHAT_TEMPLATE, corpus_texts

TOKENIZER = train_tokenizer(corpus_texts(), 300)
CHAT = [
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
    found = open_chat_template(None, write_folder(folder, chat_template=text), TOKENIZER, [0])
    assert found is not None
    return found


def test_a_conversation_is_rendered_up_to_where_the_assistant_speaks(tmp_path: Path) -> None:
    text = template_of(tmp_path).render(CHAT[:3])
    assert text == f"{BOS}<user>Why?</user><assistant>Because.</assistant><user>And then?</user><assistant>"


def test_the_tokens_that_the_assistant_speaks_are_its_words_and_closing_marks(tmp_path: Path) -> None:
    tokens, loss_mask = template_of(tmp_path).encode_with_mask(CHAT)
    said = TOKENIZER.decode([token for token, one in zip(tokens, loss_mask, strict=True) if one])
    assert said == "Because.</assistant>Nothing at all.</assistant>"


def test_a_conversation_begins_with_the_tokens_it_is_asked_with(tmp_path: Path) -> None:
    chat = template_of(tmp_path)
    asked = chat.encode(CHAT[:3])
    assert chat.encode_with_mask(CHAT)[0][: len(asked)] == asked


@pytest.mark.parametrize("opens", [True, False])
def test_a_conversation_has_the_begin_mark_once(opens: bool, tmp_path: Path) -> None:
    text = CHAT_TEMPLATE if opens else CHAT_TEMPLATE.replace("{{- bos_token -}}", "")
    chat = template_of(tmp_path, text)
    tokens, loss_mask = chat.encode_with_mask(CHAT)
    for found in (tokens, chat.encode(CHAT[:1])):
        assert (found[0], found.count(0)) == (0, 1)
    assert (len(loss_mask), loss_mask[0]) == (len(tokens), False)


def test_reading_marks_of_a_template_leaves_documents_their_characters(tmp_path: Path) -> None:
    tokenizer = read_special_tokens_as_text(Tokenizer.from_str(TOKENIZER.to_str()))
    chat = open_chat_template(None, write_folder(tmp_path, chat_template=f"a{EOS}"), tokenizer, [])
    assert chat is not None
    assert chat.encode(CHAT)[-1] == 1
    assert 1 not in tokenizer.encode(f"a{EOS}", add_special_tokens=False).ids


@pytest.mark.parametrize("stored", [["tool", "T"], ["default", "D"], None])
def test_of_several_stored_templates_the_default_counts(stored: list[str] | None, tmp_path: Path) -> None:
    templates = [{"name": "other", "template": "O"}]
    if stored is not None:
        templates.append(dict(zip(["name", "template"], stored, strict=True)))
    found = open_chat_template(None, write_folder(tmp_path, chat_template=templates), TOKENIZER, [])
    assert (found and found.text) == ("D" if stored == ["default", "D"] else None)


def test_a_file_of_the_user_counts_before_the_tokenizers_own(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="from config")
    (tmp_path / "chat_template.jinja").write_text("from folder", encoding="utf-8")
    (tmp_path / "mine.jinja").write_text("mine", encoding="utf-8")
    found = [open_chat_template(path, tmp_path, TOKENIZER, []) for path in (None, str(tmp_path / "mine.jinja"))]
    assert [one and one.text for one in found] == ["from folder", "mine"]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].sha256 != found[1].sha256


@pytest.mark.parametrize("text", ["{% if %}", "{{ raise_exception('no system message') }}"])
def test_a_template_that_cannot_render_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat template .*tokenizer_config.json: cannot render .*; mend it"):
        template_of(tmp_path, text).render(CHAT)


def test_a_template_that_rewrites_earlier_turns_does_not_tell_who_speaks(tmp_path: Path) -> None:
    chat = template_of(tmp_path, "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(UserError, match="writes a turn differently once others follow"):
        chat.encode_with_mask(CHAT)
