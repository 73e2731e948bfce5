from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mtptrain.data.tokenizer import BOS, EOS, load_tokenizer, save_tokenizer, train_tokenizer
from mtptrain.errors import UserError

VOCAB_SIZE = 300
TOKENIZER = train_tokenizer(["def f(x):\n    return x\n", "the cat and the hat"] * 3, VOCAB_SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(TOKENIZER, tmp_path)
    return tmp_path


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


def test_bos_and_eos_are_the_first_two_ids() -> None:
    assert [TOKENIZER.token_to_id(token) for token in (BOS, EOS)] == [0, 1]


def test_training_is_deterministic_and_stays_within_its_vocabulary() -> None:
    again = train_tokenizer(["def f(x):\n    return x\n", "the cat and the hat"] * 3, VOCAB_SIZE)
    assert again.to_str() == TOKENIZER.to_str()
    assert 258 < TOKENIZER.get_vocab_size() <= VOCAB_SIZE


def test_a_saved_tokenizer_is_loaded_unchanged(folder: Path) -> None:
    assert load_tokenizer(folder, VOCAB_SIZE).to_str() == TOKENIZER.to_str()


def test_transformers_loads_the_same_tokenizer(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "the hat f(x)"
    assert theirs.encode(text, add_special_tokens=False) == encode(TOKENIZER, text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    size = TOKENIZER.get_vocab_size()
    load_tokenizer(folder, size)
    with pytest.raises(UserError, match=rf"backbone\.path=.* has {size} tokens .* {size - 1}; use the tokenizer"):
        load_tokenizer(folder, size - 1)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.path=.*: holds no tokenizer\.json; put"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe\x00", None])
def test_a_damaged_tokenizer_is_refused(damage: bytes | None, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(UserError, match=r"backbone\.path=.*: tokenizer\.json cannot be read"):
        load_tokenizer(folder, VOCAB_SIZE)


def test_a_stored_truncation_or_padding_is_switched_off(folder: Path) -> None:
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=200)
    stored.save(str(folder / "tokenizer.json"))
    text = "the cat and the hat " * 20
    loaded = load_tokenizer(folder, VOCAB_SIZE)
    assert encode(loaded, text) == encode(TOKENIZER, text)
    assert loaded.encode_batch_fast([text, "the"], add_special_tokens=False)[1].ids == encode(TOKENIZER, "the")
    assert loaded.to_str() == TOKENIZER.to_str()
