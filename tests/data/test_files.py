"""Files of rows of every kind, whole and damaged."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from mtptrain.data.files import json_lines, local_files, read_json_lines, read_rows, read_text
from mtptrain.errors import UserError

ROWS = [{"text": "one, two"}, {"text": 'three\n"four"'}, {"text": "äöü 🙂"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = 'text\n"one, two"\n"three\n""four"""\näöü 🙂\n'
BOM = b"\xef\xbb\xbf"


def compress_zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": compress_zst}


def rows_of(path: Path) -> list[object]:
    return [row for _, row in read_rows("data.path=F", path)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "with BOM"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", LINES),
        (".jsonl", LINES.replace("\n", "\r\n").rstrip()),
        (".jsonl", f"\n \n{LINES}"),
        (".json", LINES),
        (".json", json.dumps(ROWS)),
        (".json", json.dumps(ROWS, indent=2)),
        (".csv", TABLE),
        (".csv", TABLE.replace("\n", "\r\n").replace("three\r\n", "three\n")),
    ],
)
def test_every_kind_of_file_gives_its_rows(suffix: str, content: str, mark: bytes, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKED[packed](mark + content.encode()))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("content", [json.dumps(ROWS[0]), json.dumps(ROWS[0], indent=2)])
def test_a_json_file_of_one_object_is_one_row(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert rows_of(tmp_path / "a.json") == ROWS[:1]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("content", [b"", BOM, b"\n\n"])
def test_an_empty_file_has_no_rows(content: bytes, suffix: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKED[packed](content) if content else b"")
    assert rows_of(path) == []


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a\n[1]\nnull\n\xff\n{"a": 2}',
            ["line 2 is not JSON", "line 3 is not a", "line 4 is not a", "line 5 is not UTF-8"],
        ),
        (
            "a.jsonl",
            b'{"a": 1}\n{"b": ' + b"9" * 5000 + b"}\n" + b'{"b": ' + b"[" * 9999 + b'\n{"a": 2}',
            ["line 2 is not JSON", "line 3 is not JSON"],
        ),
        ("a.json", b'[{"a": 1}, 3, null, {"a": 2}]', ["row 2 is not a JSON object", "row 3 is not a JSON object"]),
        (
            "a.csv",
            b'a\n1\n2,3\n"x"y\n\xff\n2\n',
            ["row 2 has 2 fields and the header 1", "row 3 is not CSV", "row 4 is not UTF-8"],
        ),
        ("a.csv", b'a\n1\n2\n"open\n', ["row 3 is not CSV"]),
    ],
)
def test_bad_rows_are_named_between_the_good_ones(
    name: str, content: bytes, reasons: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = rows_of(tmp_path / name)
    assert [str(row["a"]) for row in rows if isinstance(row, dict)] == ["1", "2"]
    bad = [str(row) for row in rows if isinstance(row, UserError)]
    assert len(bad) == len(reasons)
    assert all(reason in one for one, reason in zip(bad, reasons, strict=True))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"no" + content])
def test_a_damaged_compression_is_named(damage: Callable[[bytes], bytes], packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(damage(PACKED[packed](LINES.encode() * 9)))
    with pytest.raises(UserError, match=r"data\.path=F: cannot be read \(.+\); check the file"):
        rows_of(path)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_compressed_files_may_be_joined(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACKED[packed](LINES.encode()) * 2)
    assert rows_of(path) == ROWS * 2


@pytest.mark.parametrize("packed", PACKED)
def test_reading_resumes_at_a_position(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACKED[packed](BOM + LINES.encode()))
    position = [0, 0]
    next(read_json_lines("F", path, position))
    assert [row for _, row in read_json_lines("F", path, position)] == ROWS[1:]


def test_halves_of_surrogate_pairs_become_replacement_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"a": "\ud83d\ude00 \uD83D x", "b": [{"c\udc00": "\udfff"}]}', encoding="utf-8")
    ((_, row),) = json_lines(f"data.path={path}", path)
    assert row == {"a": "😀 � x", "b": [{"c�": "�"}]}
    assert "line 1 holds half of a surrogate pair" in capsys.readouterr().err


def test_whole_surrogate_pairs_are_not_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"a": "\ud83d\ude00"}', encoding="utf-8")
    assert [row for _, row in json_lines("F", path)] == [{"a": "😀"}]
    assert capsys.readouterr().err == ""


def test_hidden_files_and_folders_are_not_read_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / ".cache" / "text"  # a hidden folder that was asked for is read
    for name in ("a.jsonl", ".b.jsonl", "deep/.ipynb_checkpoints/c.jsonl", "deep/d.jsonl", ".git/x/e.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert local_files(f"data.path={root}", root, (".jsonl",)) == [root / "a.jsonl", root / "deep" / "d.jsonl"]
    assert "3 hidden files" in capsys.readouterr().err


def test_a_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + "äöü".encode())
    assert read_text("F", tmp_path / "a.txt") == "äöü"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text,text\na,b\n", "names a column twice"),
        ("text\nä\n".encode("utf-16"), "is not UTF-8; convert it"),
        (b'"text\na\n', "has a header that is not CSV"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        rows_of(tmp_path / "a.csv")
