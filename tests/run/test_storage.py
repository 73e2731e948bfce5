import hashlib
import os
from pathlib import Path

import pytest

from mtptrain.run.storage import atomic_file, atomic_folder, clear_leftovers, sha256_file, write_json, write_text


class Interrupted(Exception):
    """Any error that ends a block early."""


def half_write_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise Interrupted


def half_write_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "new").write_text("half")
        raise Interrupted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["deep", "file.txt"]


def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(Interrupted):
        half_write_file(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_file_that_was_never_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with atomic_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["a", "deep", "folder", "sub"]


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with atomic_folder(folder) as temporary:
        (temporary / "new").write_text("new")
        assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder", "new"]


def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(Interrupted):
        half_write_folder(folder)
    assert names(tmp_path) == ["folder", "old"]


def test_a_folder_that_must_not_be_replaced_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(FileExistsError), atomic_folder(folder, replaces=False) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["folder", "old"]
    (folder / "old").unlink()
    with atomic_folder(folder, replaces=False) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["folder", "new"]


def private(path: Path) -> None:
    """Create a file with the permissions that safetensors gives it."""
    path.touch()
    path.chmod(0o600)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_get_the_rights_that_the_umask_leaves(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            private(temporary)
        with atomic_folder(tmp_path / "folder") as temporary:
            private(temporary / "file")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("file")} == {mode}


def test_files_that_are_linked_into_a_folder_keep_their_rights(tmp_path: Path) -> None:
    for name in ("hard", "soft"):
        private(tmp_path / name)
    with atomic_folder(tmp_path / "folder") as temporary:
        os.link(tmp_path / "hard", temporary / "hard")
        (temporary / "soft").symlink_to(tmp_path / "soft")
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("hard", "soft")} == {0o600}


def test_temporary_names_are_hidden_and_end_in_tmp(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file.txt") as file, atomic_folder(tmp_path / "step_1") as folder:
        file.write_text("")
        assert {file.parent, folder.parent} == {tmp_path}
        for path in (file, folder):
            assert path.name.startswith(".")
            assert path.name.endswith(".tmp")


def test_json_that_no_other_program_could_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": [1, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'


def test_a_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "äöü\n")
    assert sha256_file(tmp_path / "text") == hashlib.sha256("äöü\n".encode()).hexdigest()


def test_leftovers_are_cleared_where_others_write_once_they_are_idle(tmp_path: Path) -> None:
    for name in (".a.0123abcd.tmp", ".b.0123abcd.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".a.0123abcd.tmp", (0, 0))
    clear_leftovers(tmp_path, idle_seconds=3600)
    assert names(tmp_path) == [".b.0123abcd.tmp"]
