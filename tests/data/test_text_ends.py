"""The begin, close and end tokens of texts: what each file of a model's folder contributes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from mtptrain.config import DataConfig
from mtptrain.data.chat import open_chat_template
from mtptrain.data.documents import Document
from mtptrain.data.packing import fill_rows, pack_corpus
from mtptrain.data.text_ends import TextEnds, read_text_ends
from mtptrain.data.tokenizer import BOS, EOS, load_tokenizer, save_tokenizer, train_tokenizer
from mtptrain.data.tokens import Encoder, tokenize_corpus
from mtptrain.errors import UserError
from mtptrain.traces.prompts import PromptRow, encode_prompt_row
from tests.conftest import CHAT_TEMPLATE

VOCAB_SIZE = 300
TOKENIZER = train_tokenizer(["the cat and the hat"] * 3, VOCAB_SIZE)
SIZE = TOKENIZER.get_vocab_size()
WRITES_BOS = Sequence([ByteLevel(), TemplateProcessing(f"{BOS} $A", None, [(BOS, 0)])])


def add_post_processor(folder: Path, processor: Any) -> Tokenizer:
    """Give the tokenizer of a folder a post-processor, and load it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, VOCAB_SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(TOKENIZER, tmp_path)
    return tmp_path


def ends(folder: Path, end: Any = 1, begin: int | None = 0, tokenizer: Tokenizer = TOKENIZER) -> TextEnds:
    return read_text_ends(folder, tokenizer, begin, end, VOCAB_SIZE)


def write(folder: Path, name: str, **content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_every_end_token_of_both_configs_ends_a_text_and_the_tokenizers_own_closes_a_document(folder: Path) -> None:
    write(folder, "generation_config.json", eos_token_id=[1, 8])
    assert ends(folder, [7, 9]) == TextEnds([0], [1], frozenset([1, 7, 8, 9]))
    write(folder, "generation_config.json", eos_token_id=8)
    assert ends(folder, 7) == TextEnds([0], [1], frozenset([1, 7, 8]))


@pytest.mark.parametrize("own", [{"content": "h"}, "h"])
def test_the_tokenizers_own_end_token_may_be_written_in_either_form(own: object, folder: Path) -> None:
    write(folder, "tokenizer_config.json", eos_token=own)
    h = TOKENIZER.token_to_id("h")
    assert ends(folder) == TextEnds([0], [h], frozenset([1, h]))


def test_without_an_end_token_of_the_tokenizer_the_first_one_of_the_config_closes(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert ends(folder, [SIZE, 7, 1]) == TextEnds([0], [7], frozenset([1, 7, SIZE]))
    assert ends(folder, None) == TextEnds([0], [], frozenset())


def test_tokens_that_the_backbone_cannot_emit_end_nothing(folder: Path) -> None:
    assert ends(folder, [1, VOCAB_SIZE, 9]).stop == {1, 9}


@pytest.mark.parametrize("value", ["1", [1, "2"], True, -1, 1.0])
def test_an_end_token_that_is_no_id_is_refused(value: object, folder: Path) -> None:
    write(folder, "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match=r"backbone\.path=.*: eos_token_id of generation_config\.json is .* must be"):
        ends(folder)


def test_a_damaged_generation_config_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"backbone\.path=.*: generation_config\.json cannot be read"):
        ends(folder)


@pytest.mark.parametrize("begin", [0, None])
def test_a_begin_token_of_the_post_processor_is_written_once_with_or_without_the_config(
    begin: int | None, folder: Path
) -> None:
    tokenizer = add_post_processor(folder, WRITES_BOS)
    assert ends(folder, begin=begin, tokenizer=tokenizer) == TextEnds([0], [1], frozenset([1]))
    after = TemplateProcessing(f"$A {EOS}", None, [(EOS, 1)])
    assert ends(folder, begin=begin, tokenizer=add_post_processor(folder, after)).begin == [0][: begin is not None]


def test_a_long_document_has_one_begin_token_in_all_its_packed_pieces(folder: Path) -> None:
    tokenizer = add_post_processor(folder, WRITES_BOS)
    found = ends(folder, tokenizer=tokenizer)
    encoder = Encoder(tokenizer, (found.begin, found.close))
    corpus = tokenize_corpus([Document("long", "the cat and the hat " * 40)], encoder, folder)
    rows = fill_rows(corpus.tokens, pack_corpus(corpus, 16), 16)
    begins = (rows.tokens_BS == 0) & (rows.segment_BS > 0)
    assert len(rows.tokens_BS) > 5
    assert int(begins.sum()) == 1
    assert (corpus.tokens[0], corpus.tokens[-1]) == (0, 1)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("{{- bos_token -}}", "")])
def test_prompts_and_conversations_begin_with_one_begin_token(template: str, folder: Path) -> None:
    tokenizer = add_post_processor(folder, WRITES_BOS)
    found = ends(folder, begin=None, tokenizer=tokenizer)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = open_chat_template(DataConfig(), folder, tokenizer, found.begin)
    assert chat is not None
    messages = [{"role": "user", "content": "the hat"}, {"role": "assistant", "content": "the cat"}]
    text = encode_prompt_row(PromptRow("", "", "the hat", [], []), 0, tokenizer, found.begin, chat)
    talk = encode_prompt_row(PromptRow("", "", "", messages[:1], []), 0, tokenizer, found.begin, chat)
    [whole] = chat.encode_rows(messages)
    for tokens in (text.prompt.tokens, talk.prompt.tokens, whole.tokens):
        assert (tokens[0], tokens.count(0)) == (0, 1)
