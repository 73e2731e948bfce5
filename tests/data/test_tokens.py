from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mtptrain.config import OnBadRow, Turns
from mtptrain.data import notes
from mtptrain.data.chat import ChatTemplate
from mtptrain.data.documents import Document
from mtptrain.data.tokenizer import BOS, train_tokenizer
from mtptrain.data.tokens import (
    BATCH_CHARACTERS,
    BATCH_DOCUMENTS,
    Encoder,
    TokenizedCorpus,
    cache_folder,
    share_corpus,
    tokenize_corpus,
)
from mtptrain.errors import UserError
from mtptrain.run import distributed, nodes
from tests.conftest import CHAT_TEMPLATE

BOS_EOS = ([0], [1])
DOCUMENTS = [Document("a", "one two"), Document("b", ""), Document("c", "drei äöü 🙂 \n\t end")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one two three four one two"], 280)


def test_every_document_comes_back_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    assert len(corpus.offsets) == 4
    for index, document in enumerate(DOCUMENTS):
        tokens = corpus.document(index).tolist()
        assert tokenizer.decode(tokens[1:-1]) == document.text


@pytest.mark.parametrize("bos_eos", [([], []), ([0], [1]), ([0, 7], [1, 1, 1])])
def test_bos_and_eos_surround_every_document(
    bos_eos: tuple[list[int], list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before, after = bos_eos
    corpus = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, bos_eos), tmp_path)
    for index, document in enumerate(DOCUMENTS):
        plain = tokenizer.encode(document.text, add_special_tokens=False).ids
        assert corpus.document(index).tolist() == [*before, *plain, *after]


def test_bytes_are_counted_in_utf8_without_bos_and_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    assert corpus.num_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)


def test_no_documents_make_an_empty_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tokenize_corpus([], Encoder(tokenizer, BOS_EOS), tmp_path)
    assert (corpus.offsets.tolist(), len(corpus.tokens), corpus.num_bytes) == ([0], 0, 0)


def test_a_second_call_reads_what_the_first_one_wrote(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat()
    second = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.offsets, second.offsets)


@pytest.mark.parametrize(
    "texts",
    [["one two", "", "other"], ["one two"], ["one", " two", "", "drei äöü 🙂 \n\t end"]],
    ids=["edited", "shorter", "cut elsewhere"],
)
def test_another_text_has_a_file_of_its_own(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    tokenize_corpus([Document("a", text) for text in texts], Encoder(tokenizer, BOS_EOS), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_bos_eos_ids_or_another_tokenizer_have_a_file_of_their_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    tokenize_corpus(DOCUMENTS, Encoder(tokenizer, ([0], [])), tmp_path)
    tokenize_corpus(DOCUMENTS, Encoder(train_tokenizer(["other words"], 262), BOS_EOS), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_while_encoding_leaves_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [Document("good", "fine"), Document("bad", "half a pair: \ud83d")]
    with pytest.raises(TypeError):  # the tokenizers library rejects lone surrogates
        tokenize_corpus(documents, Encoder(tokenizer, BOS_EOS), tmp_path / "cache")
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("num_documents", [1, BATCH_DOCUMENTS - 1, BATCH_DOCUMENTS, BATCH_DOCUMENTS + 1])
def test_documents_are_encoded_in_order_at_any_number(num_documents: int, tokenizer: Tokenizer) -> None:
    encoded = Encoder(tokenizer, BOS_EOS).encode(Document("", str(n)) for n in range(num_documents))
    assert [tokenizer.decode(one.tokens.tolist()[1:-1]) for one in encoded] == [str(n) for n in range(num_documents)]


def test_long_documents_are_not_gathered_before_they_are_encoded() -> None:
    word = " internationalisation"
    one_token_a_word = train_tokenizer([word * 9], 300)
    read = []

    def documents() -> Iterator[Document]:
        for number in range(4):
            read.append(number)
            yield Document(str(number), word * (BATCH_CHARACTERS // 2 // len(word) + 1))

    next(Encoder(one_token_a_word, BOS_EOS).encode(documents()))
    assert read == [0, 1]


def test_a_conversation_keeps_its_mask_through_the_cache(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three four"], 280)
    chat = ChatTemplate(CHAT_TEMPLATE, Path("x.jinja"), {"bos_token": BOS}, tokenizer, [0])
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
    documents = [Document("text", "three"), Document("talk", "one?\ntwo.", messages)]
    made, read = (tokenize_corpus(documents, Encoder(tokenizer, BOS_EOS, chat), tmp_path) for _ in range(2))
    assert made.loss_mask is not None
    assert read.loss_mask is not None
    assert np.array_equal(made.loss_mask, read.loss_mask)
    text, answer = np.split(made.tokens[made.loss_mask], [len(made.document(0))])
    assert text.tolist() == made.document(0).tolist()  # all tokens of a text are targets
    assert tokenizer.decode(answer.tolist()) == "two.</assistant>"
    assert made.num_bytes == len("three") + len(chat.render(messages, add_generation_prompt=False))


def test_another_template_has_a_file_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [Document("talk", "a", [{"role": "assistant", "content": "a"}])]
    for text in (CHAT_TEMPLATE, CHAT_TEMPLATE + " "):
        chat = ChatTemplate(text, Path("x.jinja"), {}, tokenizer, [0])
        tokenize_corpus(talk, Encoder(tokenizer, BOS_EOS, chat), tmp_path)
        tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS, chat), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_cache_lies_where_it_is_set_or_else_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("here") == Path("here")
    assert cache_folder(None) == tmp_path / "mtptrain"


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], lambda _: b"no"])
def test_a_damaged_cache_is_made_anew(damage: Callable[[bytes], bytes], tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    again = tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)
    assert np.array_equal(again.tokens, whole.tokens)
    assert path.read_bytes() == content


def test_a_small_try_holds_whole_documents_up_to_a_number_of_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    encoder = Encoder(tokenizer, BOS_EOS)
    whole = tokenize_corpus(DOCUMENTS, encoder, tmp_path)
    limits = range(int(whole.offsets[1]), len(whole.tokens) + 3)
    for limit in limits:
        few = tokenize_corpus(DOCUMENTS, encoder, tmp_path, limit)
        size = max(end for end in whole.offsets.tolist() if end <= limit)
        assert few.tokens.tolist() == whole.tokens[:size].tolist()
    with pytest.raises(UserError, match=rf"data\.max_tokens=2: the first document has {limits[0]}; set at least"):
        tokenize_corpus(DOCUMENTS, encoder, tmp_path, 2)


def test_conversations_that_the_template_rejects_are_left_out_and_named_from_the_cache_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["one two three four"], 280)
    chat = ChatTemplate(
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE,
        Path("x.jinja"),
        {},
        tokenizer,
        [0],
    )
    answer = {"role": "assistant", "content": "two."}
    talk = [
        Document(f"talk.jsonl:{n}", "", [{"role": "user", "content": text}, answer])
        for n, text in enumerate(["one?", "bad", "bad"])
    ]
    encoder = Encoder(tokenizer, BOS_EOS, chat, OnBadRow.skip)
    for _ in range(2):
        monkeypatch.setattr(notes, "_shown", set())
        assert len(tokenize_corpus(talk, encoder, tmp_path).offsets) == 2
        line = capsys.readouterr().err
        assert "2 bad rows left out: data.path: talk.jsonl, row 2: chat template x.jinja: cannot render" in line
    with pytest.raises(UserError, match=r"talk\.jsonl, row 2: .*; data\.on_bad_row=skip leaves such rows out"):
        tokenize_corpus(talk, replace(encoder, on_bad_row=OnBadRow.error), tmp_path)


def test_tools_and_turns_have_a_file_of_their_own(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three four"], 280)
    messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
    chat = ChatTemplate("{{ tools }}" + CHAT_TEMPLATE, Path("x.jinja"), {}, tokenizer, [0])
    tools = [{"type": "function", "function": {"name": "f"}}]
    made = [
        (Document("talk:0", "", messages), chat),
        (Document("talk:0", "", messages, tools), chat),
        (Document("talk:0", "", messages), replace(chat, turns=Turns.each)),
        (Document("talk:0", "", messages), replace(chat, arguments={"a": 1})),
    ]
    for document, template in made:
        tokenize_corpus([document], Encoder(tokenizer, BOS_EOS, template), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(made)


def test_one_process_of_a_node_tokenises_and_the_others_read_its_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []

    def make() -> TokenizedCorpus:
        return tokenize_corpus(DOCUMENTS, Encoder(tokenizer, BOS_EOS), tmp_path)

    def gather_objects(value: object) -> list[object]:
        told.append(value)
        return list(told)

    monkeypatch.setattr(nodes, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", gather_objects)
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = share_corpus(make)
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = share_corpus(lambda: pytest.fail("tokenised twice"))
    assert second.digest() == first.digest()
    assert second.file == first.file


def test_a_mistake_of_the_process_that_tokenises_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> TokenizedCorpus:
        raise UserError("data.path=x: cannot be read")

    monkeypatch.setattr(nodes, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, (("elsewhere", []), None)])
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"data\.path=x"):
        share_corpus(fail)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [(None, UserError("data.path=x: no")), value])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"data\.path=x"):
        share_corpus(lambda: pytest.fail("tokenised"))
