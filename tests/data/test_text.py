import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset

from mtptrain.config import DataConfig, DataSource, OnBadRow
from mtptrain.data.documents import Document, Split
from mtptrain.data.text import TextReader, text_documents
from mtptrain.errors import UserError

TEXTS = ["first text", "second\ntext", "dritter Text: äöü"]


@pytest.fixture(autouse=True)
def offline_and_cached_in_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Set what HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE=... would set before the first import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def config_of(path: Path | str, **settings: object) -> DataConfig:
    return DataConfig(source=DataSource.text, path=str(path), **settings)


def texts_of(path: Path | str, **settings: object) -> list[str]:
    return [document.text for document in TextReader(config_of(path, **settings))]


def write_txt(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text(TEXTS[1], encoding="utf-8")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 3}) for text in TEXTS) + "\n", encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "corpus.parquet"
    Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("write", "texts"), [(write_txt, [TEXTS[1]]), (write_jsonl, TEXTS), (write_parquet, TEXTS)])
def test_a_file_of_each_kind_gives_its_texts_in_order(
    write: Callable[[Path], Path], texts: list[str], streaming: bool, tmp_path: Path
) -> None:
    assert texts_of(write(tmp_path), streaming=streaming) == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_gives_the_documents_of_all_its_files_and_ignores_others(streaming: bool, tmp_path: Path) -> None:
    for write in (write_txt, write_jsonl, write_parquet):
        (tmp_path / "deeper").mkdir(exist_ok=True)
        write(tmp_path / "deeper")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    assert texts_of(tmp_path, streaming=streaming) == [*TEXTS, *TEXTS, TEXTS[1]]


def test_streaming_gives_the_same_documents(tmp_path: Path) -> None:
    for write in (write_txt, write_jsonl, write_parquet):
        write(tmp_path)
    read, streamed = (list(TextReader(config_of(tmp_path, streaming=streaming))) for streaming in (False, True))
    assert streamed == read


def test_files_of_one_name_in_different_folders_are_different_documents(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_txt(tmp_path / folder)
    assert [document.name for document in TextReader(config_of(tmp_path))] == ["a/corpus.txt", "b/corpus.txt"]


def test_a_document_has_one_name_wherever_its_folder_lies(tmp_path: Path) -> None:
    names = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        path = write_jsonl(tmp_path / folder)
        names.append([[document.name for document in TextReader(config_of(p))] for p in (path, path.parent)])
    assert names == [[["corpus.jsonl:0", "corpus.jsonl:1", "corpus.jsonl:2"]] * 2] * 2


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": ""}\n\n{"text": " \\n"}\n{"text": "x"}\n', encoding="utf-8")
    assert list(TextReader(config_of(path))) == [Document("corpus.jsonl:2", "x")]


def test_another_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"body": "x"}\n', encoding="utf-8")
    assert texts_of(path, field_name="body") == ["x"]


def test_both_sides_of_the_hold_out_together_are_all_documents(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "text {n}"}}\n' for n in range(40)), encoding="utf-8")
    config = config_of(path, heldout_every=4, streaming=True)
    sides = [{document.text for document in text_documents(config, split)} for split in Split]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == {f"text {n}" for n in range(40)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 2 is not JSON"),
        (b'["a", "list"]', "line 2 is not a JSON object"),
        (b'{"text": "\xff\xfe"}', "line 2 is not UTF-8"),
    ],
)
def test_a_broken_json_line_is_named_with_its_number(
    line: bytes, message: str, streaming: bool, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"text": "whole"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"data\.path=.*broken\.jsonl: {message}.*;"):
        texts_of(path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_missing_column_is_named_beside_those_that_are_there(
    write: Callable[[Path], Path], streaming: bool, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"data\.field_name=body: .*row 1 .*\['id', 'text'\]; set data\.field_name"):
        texts_of(path, field_name="body", streaming=streaming)


def test_a_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.field_name=id"):
        texts_of(write_jsonl(tmp_path), field_name="id")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.path=.*absent\{suffix}: cannot be read .*; check the path"):
        texts_of(tmp_path / f"absent{suffix}")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("äöü".encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.path=.*latin\.txt: is not UTF-8 .*; convert it"):
        texts_of(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_parquet_file_is_named(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    path.write_bytes(b"PAR1 but then something else")
    with pytest.raises(UserError, match=r"data\.path=.*damaged\.parquet: datasets cannot load it .*; check the file"):
        texts_of(path, streaming=streaming)


@pytest.mark.parametrize("name", ["folder", "folder.txt"])
def test_a_folder_without_a_readable_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(
        UserError,
        match=r"data\.path=.*folder.*: the folder holds no file that ends in .txt, .jsonl, .json, .csv, .parq.*; g",
    ):
        texts_of(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.pdf"
    path.write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data\.path=.*corpus\.pdf: a file must end in .txt, .jsonl, .json, .csv, .parquet.*; convert"
    ):
        texts_of(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_data_without_a_document_is_refused(content: str, streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.path=.*empty\.jsonl: .*;|so give more documents"):
        text_documents(config_of(path, streaming=streaming), Split.train)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_datasets_does_not_know_is_refused(streaming: bool) -> None:
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing: datasets cannot load it .*; check"):
        texts_of("nobody/nothing", streaming=streaming)


def write_csv(folder: Path) -> Path:
    path = folder / "corpus.csv"
    quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
    path.write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(quoted)), encoding="utf-8")
    return path


def write_json(folder: Path) -> Path:
    path = folder / "corpus.json"
    path.write_text(json.dumps([{"text": text, "id": 3} for text in TEXTS], indent=1), encoding="utf-8")
    return path


def write_gz(folder: Path) -> Path:
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(folder).read_bytes()))
    return path


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet, write_csv, write_json, write_gz])
def test_reading_resumes_after_every_document(write: Callable[[Path], Path], tmp_path: Path) -> None:
    config = config_of(write(tmp_path), streaming=True)
    reader = TextReader(config)
    for number, _ in enumerate(reader, start=1):
        rest = [document.text for document in TextReader(config, reader.position())]
        assert rest == texts_of(config.path or "")[number:]


BAD = '{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"no": 1}\n[]\nnull\n{"text": "c"}\n'


def test_bad_rows_are_left_out_and_the_first_three_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD, encoding="utf-8")
    config = config_of(path, on_bad_row=OnBadRow.skip, heldout_every=10**9)
    assert [document.name for document in text_documents(config, Split.train)] == [f"bad.jsonl:{n}" for n in (0, 2, 6)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 bad rows left out" in line
    assert all(
        f"bad.jsonl{where}" in line for where in (", row 2: `text` is null", ", row 4 has no text", ": line 5 is not")
    )
    assert line.endswith("and 1 more")


def test_a_bad_row_ends_the_run_and_names_the_way_to_leave_it_out(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"bad\.jsonl, row 2: `text` is null; .*; data\.on_bad_row=skip leaves such rows out"
    ):
        texts_of(path)


def test_a_text_of_bad_rows_alone_is_refused_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"no": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no document on the train side.*; 1 bad row left out: .*row 1 has no text"):
        text_documents(config_of(path, on_bad_row=OnBadRow.skip), Split.train)


def test_rows_of_several_forms_are_read_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    columns = {name: [row.get(name) for row in rows] for name in ("text", "messages", "conversations")}
    Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    documents = list(TextReader(config_of(tmp_path)))
    assert [document.text for document in documents] == ["plain", "q\na", "q\na"] * 2
    assert [document.messages for document in documents[1::3]] == [rows[1]["messages"]] * 2
    assert documents[1].messages == documents[2].messages
    noted = capsys.readouterr().err
    assert noted.count("read as messages") == noted.count("read as sharegpt") == 1


def test_a_conversation_without_an_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    silent = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path.write_text(json.dumps({"messages": silent}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="row 1: has no message of role assistant to learn from; drop"):
        texts_of(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_small_try_reads_the_first_documents_of_each_side(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "text {n}"}}\n' for n in range(40)), encoding="utf-8")
    whole = config_of(path, heldout_every=4, streaming=streaming)
    for split in Split:
        few = text_documents(replace(whole, max_documents=3), split)
        assert few == text_documents(whole, split)[:3]


def test_subset_and_split_reach_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def load_dataset(path: str, /, **chosen: object) -> Dataset:
        calls.append({"path": path, **chosen})
        return Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("org/set", subset="main", split="validation") == ["a"]
    assert texts_of("org/set") == ["a"]
    assert calls == [
        {"path": "org/set", "name": "main", "split": "validation"},
        {"path": "org/set", "name": None, "split": "train"},
    ]


@pytest.mark.parametrize("setting", ["subset", "split"])
def test_settings_of_data_sets_are_refused_beside_files(setting: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"data\.{setting}=x: is of data sets, and data\.path=.*corpus\.jsonl is read as"
    ):
        texts_of(write_jsonl(tmp_path), **{setting: "x"})
