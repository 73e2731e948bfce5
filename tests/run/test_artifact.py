"""Artifacts are whole or continued, verified by checksum, and refused with every difference of identity."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mtptrain.errors import UserError
from mtptrain.run.artifact import (
    BEGUN,
    Artifact,
    Kind,
    add_part,
    begin,
    check_identity,
    find_parts,
    finish,
    open_artifact,
    seal,
    total_counts,
)
from mtptrain.run.folder_lock import LOCK
from mtptrain.run.storage import atomic_folder
from tests.command import tree


@dataclass(frozen=True, slots=True)
class Toy:
    """An identity with every kind of value."""

    model: str = "ab" * 32
    length: int = 7
    start: dict[str, str | int] = field(default_factory=lambda: {"init": "stock", "modules": 1})
    note: str | None = None


@dataclass(frozen=True, slots=True)
class OtherToy:
    """Shares one field with `Toy`."""

    length: int
    seed: int


@dataclass(frozen=True, slots=True)
class Making:
    """Choices that shape the parts."""

    batch_size: int


KIND: Kind[Toy, dict[str, int]] = Kind(
    name="toy",
    schema=3,
    identity=Toy,
    content=dict[str, int],
    settings={"model": "toy.model", "length": "toy.length", "start": "toy.init", "note": "toy.length"},
    missing="make one",
    damaged="make another",
    repair="restore it",
)
NAMES = ["part_0.bin", "part_1.bin"]


def write_at_once(folder: Path) -> Artifact[Toy, dict[str, int]]:
    with atomic_folder(folder) as temporary:
        for name in NAMES:
            (temporary / name).write_bytes(name.encode() * 9)
        seal(KIND, temporary, Toy(), {"rows": 5}, NAMES)
    return open_artifact(KIND, "toy.path", folder)


def start(folder: Path, identity: Toy | None = None, batch_size: int = 4) -> Making:
    folder.mkdir(exist_ok=True)
    return begin(KIND, "toy.path", folder, identity or Toy(), Making(batch_size))


def write_part(folder: Path, number: int) -> None:
    (folder / NAMES[number]).write_bytes(b"x" * (number + 1))
    add_part(folder, NAMES[number], {"rows": number + 1})


def complete(folder: Path) -> None:
    parts = find_parts(folder, NAMES)
    finish(KIND, folder, Toy(), parts, total_counts(parts))


# Identities


def differences(have: object, want: object) -> str:
    with pytest.raises(UserError) as raised:
        check_identity("toy.path=x", have, want, KIND.settings)
    return str(raised.value)


def test_the_same_identity_is_accepted() -> None:
    check_identity("toy.path=x", Toy(), Toy(), KIND.settings)


def test_every_difference_is_listed_with_its_setting_and_hashes_are_shortened() -> None:
    want = replace(Toy(), model="cd" * 32, length=8, start={"init": "fresh"})
    assert differences(Toy(), want) == (
        "toy.path=x: holds model=abababababab, length=7, start.init=stock, start.modules=1 and this run has "
        "model=cdcdcdcdcdcd, length=8, start.init=fresh, start.modules=None; set toy.model, toy.length, toy.init to "
        "match, or choose another folder"
    )


def test_a_setting_of_two_differences_is_named_once() -> None:
    assert "; set toy.length to match, or" in differences(Toy(), replace(Toy(), length=8, note="new"))


def test_identities_of_two_types_are_compared_by_their_shared_fields() -> None:
    line = differences(OtherToy(6, 0), Toy())
    assert line.startswith("toy.path=x: holds length=6 and this run has length=7; set toy.length")


def test_only_fields_with_a_setting_are_compared() -> None:
    check_identity("toy.path=x", OtherToy(7, 0), OtherToy(7, 1), {"length": "toy.length"})


# Written at once


def test_an_artifact_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    artifact = write_at_once(tmp_path / "toy")
    assert (artifact.identity, artifact.content, list(artifact.files)) == (Toy(), {"rows": 5}, NAMES)
    artifact.verify(artifact.files)


def test_a_folder_that_was_not_finished_is_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "toy") as temporary:
        seal(KIND, temporary, Toy(), {}, ["a file that was not written"])
    assert list(tmp_path.iterdir()) == []


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_file_is_named_and_the_others_are_sound(damage: Callable[[Path], None], tmp_path: Path) -> None:
    artifact = write_at_once(tmp_path / "toy")
    damage(artifact.folder / NAMES[1])
    line = rf"toy.path={artifact.folder}: {NAMES[1]} is missing, truncated or altered .*; restore it"
    with pytest.raises(UserError, match=line):
        artifact.verify(artifact.files)
    artifact.verify(NAMES[:1])
    assert [artifact.is_intact(name) for name in NAMES] == [True, False]


def test_a_file_that_the_manifest_does_not_list_is_not_sound(tmp_path: Path) -> None:
    artifact = write_at_once(tmp_path / "toy")
    (artifact.folder / "extra").touch()
    assert not artifact.is_intact("extra")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schema": 2}, "has schema 2 and this version of mtptrain reads 3; use the version that wrote it"),
        ({"kind": "other toy"}, "is of the kind 'other toy' and not 'toy'; make one"),
        ({"schema": None}, "manifest.json is damaged .*; make another"),
        ({"identity": {"size": 7}}, r"manifest.json is damaged \(size: unknown field.*; make another"),
        ({"files": {"a": {"bytes": 1}}}, r"manifest.json is damaged \(a.sha256: missing field"),
        ({"content": 3}, "manifest.json is damaged .*; make another"),
    ],
    ids=["schema", "kind", "no_schema", "identity", "files", "content"],
)
def test_a_manifest_that_cannot_be_used_is_refused(change: dict[str, object], line: str, tmp_path: Path) -> None:
    folder = write_at_once(tmp_path / "toy").folder
    path = folder / KIND.manifest
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f"^toy.path={folder}: {line}"):
        open_artifact(KIND, "toy.path", folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_at_once(tmp_path / "toy").folder
    (folder / KIND.manifest).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.*\); make another"):
        open_artifact(KIND, "toy.path", folder)


# Made part by part


def test_a_folder_is_whole_once_it_is_finished(tmp_path: Path) -> None:
    start(tmp_path)
    write_part(tmp_path, 0)
    with pytest.raises(UserError, match=rf"toy.path={tmp_path}: holds no manifest.json; make one"):
        open_artifact(KIND, "toy.path", tmp_path)
    write_part(tmp_path, 1)
    complete(tmp_path)
    artifact = open_artifact(KIND, "toy.path", tmp_path)
    assert artifact.content == {"rows": 3}
    artifact.verify(NAMES)


def test_a_folder_is_continued_the_way_it_was_begun(tmp_path: Path) -> None:
    assert start(tmp_path, batch_size=4) == Making(4)
    write_part(tmp_path, 0)
    assert start(tmp_path, batch_size=9) == Making(4)
    assert list(find_parts(tmp_path, NAMES)) == NAMES[:1]


@pytest.mark.parametrize("damage", ["no record", "no file", "another size", "damaged record"])
def test_a_part_that_was_not_completed_is_made_again(damage: str, tmp_path: Path) -> None:
    start(tmp_path)
    for number in range(2):
        write_part(tmp_path, number)
    record, file = tmp_path / "part_1.json", tmp_path / NAMES[1]
    if damage == "no record":
        record.unlink()
    elif damage == "no file":
        file.unlink()
    elif damage == "another size":
        file.write_bytes(b"xyz")
    else:
        truncate(record)
        truncate(record)
    assert list(find_parts(tmp_path, NAMES)) == NAMES[:1]


def test_another_identity_does_not_continue_a_folder(tmp_path: Path) -> None:
    start(tmp_path)
    write_part(tmp_path, 0)
    before = tree(tmp_path)
    line = re.escape(f"toy.path={tmp_path}: holds length=7 and this run has length=8; set toy.length to match, or")
    with pytest.raises(UserError, match=line):
        start(tmp_path, replace(Toy(), length=8))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schema": 2}, "has schema 2 and .* reads 3"),
        ({"making": {}}, f"{BEGUN} is damaged"),
        ({"kind": "x"}, "is of the kind 'x'"),
    ],
    ids=["schema", "making", "kind"],
)
def test_a_folder_of_another_version_or_kind_is_not_continued(
    change: dict[str, object], line: str, tmp_path: Path
) -> None:
    start(tmp_path)
    content = json.loads((tmp_path / BEGUN).read_text())
    (tmp_path / BEGUN).write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=line):
        start(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match=f"toy.path={tmp_path}: holds other files than a toy; choose an empty or a new"):
        start(tmp_path)
    (tmp_path / "notes").unlink()
    start(tmp_path)  # the lock does not count as a file


def test_a_finished_folder_is_not_overwritten(tmp_path: Path) -> None:
    start(tmp_path)
    for number in range(2):
        write_part(tmp_path, number)
    complete(tmp_path)
    before = tree(tmp_path)
    start(tmp_path)
    finish(KIND, tmp_path, Toy(), {}, {"rows": 0})
    assert tree(tmp_path) == before
