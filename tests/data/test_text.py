import json
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset

from mtptrain.config import DataConfig, DataSource
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
    (tmp_path / "notes.csv").write_text("not, read", encoding="utf-8")
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
        UserError, match=r"data\.path=.*folder.*: the folder holds no .txt, .jsonl, .parquet file; give"
    ):
        texts_of(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data\.path=.*corpus\.csv: a file must end in .txt, .jsonl, .parquet; convert"
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
