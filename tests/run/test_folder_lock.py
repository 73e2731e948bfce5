"""One run writes a folder at a time, and a run that has ended blocks no other."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mtptrain.errors import UserError
from mtptrain.run import folder_lock
from mtptrain.run.folder_lock import LOCK, STALE_SECONDS, FolderLock, Holder, lock_path, require_free
from mtptrain.run.typed_json import from_json, to_json
from tests.command import hold_folder

ELSEWHERE = Holder("another-machine", "", 7, 1, "2026-01-01 00:00:00", "token")


@pytest.fixture
def lock() -> Iterator[FolderLock]:
    with closing(FolderLock()) as taken:
        yield taken


def take(lock: FolderLock, folder: Path) -> Holder:
    lock.take(folder, "output_dir")
    return from_json(Holder, json.loads((folder / LOCK).read_text(encoding="utf-8")))


def write_lock(folder: Path, holder: Holder, age: float = 0.0) -> None:
    path = folder / LOCK
    path.write_text(json.dumps(to_json(holder)), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_names_its_process_and_is_gone_after_it(tmp_path: Path) -> None:
    with closing(FolderLock()) as lock:
        holder = take(lock, tmp_path / "run")
        assert (holder.host, holder.process) == (socket.gethostname(), os.getpid())
        assert take(lock, tmp_path / "run") == holder  # held already
    assert list(tmp_path.iterdir()) == []  # nor does the folder, which was made for it, stay behind empty


def test_a_folder_that_was_there_or_is_used_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with closing(FolderLock()) as lock:
        lock.take(tmp_path / "there", "output_dir")
        lock.take(tmp_path / "deep" / "used", "output_dir")
        (tmp_path / "deep" / "used" / "file").touch()
        lock.take(tmp_path / "empty" / "whole", "output_dir", beside=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "there", "used"]


@pytest.mark.parametrize("is_beside", [False, True], ids=["inside", "beside"])
def test_of_two_processes_that_want_a_folder_the_second_is_refused(
    is_beside: bool, lock: FolderLock, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = hold_folder(folder, is_beside)
    path = lock_path(folder, is_beside)
    line = rf"^output_dir={folder}: process {process.pid} on .* is writing there; .* If it is gone, delete {path}$"
    with pytest.raises(UserError, match=line):
        lock.take(folder, "output_dir", is_beside)
    with pytest.raises(UserError, match=line):
        require_free(folder, "output_dir")
    assert folder.exists() != is_beside  # a folder locked from beside appears only when it is complete
    process.communicate()  # closes its stdin, which ends it
    require_free(folder, "output_dir")
    lock.take(folder, "output_dir", is_beside)


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(
    lock: FolderLock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = hold_folder(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped yet
    holder = take(lock, tmp_path)
    process.communicate()
    assert holder.process == os.getpid()
    note = f"output_dir={tmp_path}: taking over from process {process.pid} on {socket.gethostname()}, which ended"
    assert capfd.readouterr().err.startswith(note)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_later_process_of_the_same_number_does_not_hold_the_lock(lock: FolderLock, tmp_path: Path) -> None:
    with closing(FolderLock()) as former:  # its thread would complain about the lock below
        current = take(former, tmp_path)
    write_lock(tmp_path, replace(current, started=current.started - 1))
    assert take(lock, tmp_path).started == current.started


@pytest.mark.parametrize("is_container", [False, True])
def test_a_lock_of_another_machine_is_stale_once_it_is_no_longer_touched(
    is_container: bool, lock: FolderLock, tmp_path: Path
) -> None:
    holder = replace(ELSEWHERE, host=socket.gethostname(), space="pid:[1]") if is_container else ELSEWHERE
    write_lock(tmp_path, holder, age=STALE_SECONDS - 60)
    with pytest.raises(UserError, match=rf"process 7 on {holder.host} \(since 2026-01-01 00:00:00\) is writing there"):
        lock.take(tmp_path, "output_dir")
    write_lock(tmp_path, holder, age=STALE_SECONDS + 60)
    assert take(lock, tmp_path).process == os.getpid()


def test_an_unreadable_lock_counts_as_one_of_another_machine(lock: FolderLock, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.touch()  # as it is between its creation and its content
    with pytest.raises(UserError, match="another run is writing there"):
        lock.take(tmp_path, "output_dir")
    os.utime(path, (0, 0))
    assert take(lock, tmp_path).process == os.getpid()


def test_the_age_of_a_lock_does_not_depend_on_this_machines_clock(
    lock: FolderLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lock(tmp_path, ELSEWHERE)
    now = time.time()
    monkeypatch.setattr(folder_lock.time, "time", lambda: now + 3600)
    with pytest.raises(UserError, match="process 7 on another-machine"):
        lock.take(tmp_path, "output_dir")


def test_a_held_lock_is_touched(lock: FolderLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "TOUCH_SECONDS", 0.01)
    take(lock, tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 30
    while (tmp_path / LOCK).stat().st_mtime < time.time() - 60:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_loss_of_a_lock_is_said(
    lock: FolderLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder_lock, "TOUCH_SECONDS", 0.01)
    take(lock, tmp_path)
    write_lock(tmp_path, ELSEWHERE)
    deadline, said = time.monotonic() + 30, ""
    while "is no longer this run's" not in said:
        assert time.monotonic() < deadline
        said += capfd.readouterr().err
        time.sleep(0.01)


def test_a_released_folder_is_free_and_the_others_stay_held(lock: FolderLock, tmp_path: Path) -> None:
    for name in ("texts", "run"):
        lock.take(tmp_path / name, "output_dir")
    lock.release(tmp_path / "texts")
    assert [path.parent.name for path in tmp_path.rglob(LOCK)] == ["run"]


def test_a_lock_that_was_taken_over_is_not_released_by_its_former_holder(tmp_path: Path) -> None:
    with closing(FolderLock()) as lock:
        take(lock, tmp_path)
        write_lock(tmp_path, ELSEWHERE)
    assert (tmp_path / LOCK).exists()


def test_taking_a_folder_deletes_what_a_killed_run_left_and_nothing_else(lock: FolderLock, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step_1.0123abcd.tmp").mkdir(parents=True)
    (tmp_path / ".metrics.0123abcd.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    lock.take(tmp_path, "output_dir")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".mine.tmp", "checkpoints", LOCK]


def test_taking_a_folder_from_beside_leaves_its_neighbours_alone(lock: FolderLock, tmp_path: Path) -> None:
    for name in (".run.0123abcd.tmp", ".other.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    process = hold_folder(tmp_path / "held", beside=True)
    (tmp_path / ".held.0123abcd.tmp").mkdir()
    lock.take(tmp_path / "run", "output_dir", beside=True)
    process.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".held.0123abcd.tmp",
        ".other.0123abcd.tmp",
        ".run.lock",
    ]


def test_the_next_export_clears_what_killed_ones_left_under_other_names(lock: FolderLock, tmp_path: Path) -> None:
    process = hold_folder(tmp_path / "killed", beside=True)
    (tmp_path / ".killed.0123abcd.tmp").mkdir()
    process.kill()
    process.communicate()
    lock.take(tmp_path / "next", "output_dir", beside=True)
    assert [path.name for path in tmp_path.iterdir()] == [".next.lock"]


def test_a_lock_that_a_killed_run_was_removing_is_cleared(lock: FolderLock, tmp_path: Path) -> None:
    (tmp_path / f"{LOCK}.0123.stale").touch()
    lock.take(tmp_path, "output_dir")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
