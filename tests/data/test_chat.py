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
    template = open_chat_template(None, write_folder(folder, chat_template=text), TOKENIZER, [0])
    assert template is not None
    return template


def test_a_conversation_is_rendered_up_to_the_opening_of_an_answer(tmp_path: Path) -> None:
    text = template_of(tmp_path).render(CHAT[:3])
    assert text == f"{BOS}<user>Why?</user><assistant>Because.</assistant><user>And then?</user><assistant>"


def test_the_loss_mask_covers_the_assistants_words_and_closing_tokens(tmp_path: Path) -> None:
    tokens, loss_mask = template_of(tmp_path).encode_with_mask(CHAT)
    targets = TOKENIZER.decode([token for token, is_target in zip(tokens, loss_mask, strict=True) if is_target])
    assert targets == "Because.</assistant>Nothing at all.</assistant>"


def test_a_conversation_begins_with_the_tokens_of_its_prompt(tmp_path: Path) -> None:
    chat = template_of(tmp_path)
    prompt = chat.encode(CHAT[:3])
    assert chat.encode_with_mask(CHAT)[0][: len(prompt)] == prompt


@pytest.mark.parametrize("opens", [True, False])
def test_a_conversation_has_the_bos_token_once(opens: bool, tmp_path: Path) -> None:
    text = CHAT_TEMPLATE if opens else CHAT_TEMPLATE.replace("{{- bos_token -}}", "")
    chat = template_of(tmp_path, text)
    tokens, loss_mask = chat.encode_with_mask(CHAT)
    for ids in (tokens, chat.encode(CHAT[:1])):
        assert (ids[0], ids.count(0)) == (0, 1)
    assert (len(loss_mask), loss_mask[0]) == (len(tokens), False)


def test_special_tokens_of_a_template_do_not_change_how_documents_are_encoded(tmp_path: Path) -> None:
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
    template = open_chat_template(None, write_folder(tmp_path, chat_template=templates), TOKENIZER, [])
    assert (template and template.text) == ("D" if stored == ["default", "D"] else None)


def test_a_file_of_the_user_counts_before_the_tokenizers_own(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="from config")
    (tmp_path / "chat_template.jinja").write_text("from folder", encoding="utf-8")
    (tmp_path / "user.jinja").write_text("from user", encoding="utf-8")
    stored, chosen = (open_chat_template(path, tmp_path, TOKENIZER, []) for path in (None, f"{tmp_path}/user.jinja"))
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
        chat.encode_with_mask(CHAT)
