"""One writer per folder: a lock file names the process that writes, and the lock of a killed process is taken over.

The lock is a small JSON file, created with O_EXCL, which also works on shared file systems. Its holder touches it every
`TOUCH_SECONDS`. A lock is stale, and another process may take it over, if

- it was written on this machine and its process has ended, or
- it was written on another machine, or cannot be read, and has not been touched for `STALE_SECONDS` by the clock of the
  file system, which alone dates files, so the clocks of machines need not agree.

A process in another container counts as a process on another machine.
"""

from __future__ import annotations

import glob
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mtptrain.config.verbosity import print_status
from mtptrain.errors import UserError
from mtptrain.run.storage import clear_leftovers
from mtptrain.run.typed_json import from_json, to_json

LOCK = "run.lock"
TOUCH_SECONDS, STALE_SECONDS = 30.0, 300.0
ASIDE = ".stale"  # ending of a lock file that is being removed


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that writes a folder.

    Attributes:
        host: name of its machine.
        space: PID namespace of `process`; each container has its own.
        process: PID.
        started: start of the process in clock ticks after the machine's boot; distinguishes it from a later process
            with the same PID.
        since: local time at which the process took the lock.
        token: unique to this lock.
    """

    host: str
    space: str
    process: int
    started: int
    since: str
    token: str


@dataclass(frozen=True, slots=True)
class _Held:
    """A lock of this run: its content, the event that ends its touching, and the folders that were made for it."""

    holder: Holder
    released: threading.Event
    created: list[Path]


class FolderLock:
    """Locks on all folders that a run writes; only rank 0 takes them.

    The lock file is in the folder, or beside it if the folder gets its name only once it is complete.
    """

    def __init__(self) -> None:
        self._held: dict[Path, _Held] = {}

    @property
    def folders(self) -> list[Path]:
        """The folders whose lock file is inside them."""
        return [path.parent for path in self._held if path.name == LOCK]

    def take(self, folder: Path, setting: str, beside: bool = False) -> None:
        """Lock a folder, create it if necessary, and delete half-written files of killed runs.

        Args:
            folder: to write; if this run holds its lock already, do nothing.
            setting: name of the setting that gave the folder.
            beside: whether the folder is written under a temporary name; then it is not created here.

        Raises:
            UserError: another run is writing the folder.
        """
        path = lock_path(folder, beside)
        if path in self._held:
            return
        created = [parent for parent in path.parents if not parent.exists()]
        held = self._held[path] = _Held(_create(path, f"{setting}={folder}"), threading.Event(), created)
        threading.Thread(target=_keep_fresh, args=(path, held), daemon=True).start()
        if beside:
            clear_leftovers(folder.parent, folder.name)
            _clear_after_the_dead(folder.parent)
        else:
            for part in (folder, *(one for one in folder.iterdir() if one.is_dir())):
                clear_leftovers(part)
        for aside in path.parent.glob(f"{glob.escape(path.name)}.*{ASIDE}"):  # of a run killed while it took over
            aside.unlink(missing_ok=True)

    def release(self, folder: Path, beside: bool = False) -> None:
        """Release the lock of one folder."""
        self._release(lock_path(folder, beside))

    def close(self) -> None:
        """Release all locks."""
        for path in list(self._held):
            self._release(path)

    def _release(self, path: Path) -> None:
        """Remove a lock file that is still this run's, and folders that were made for it and stayed empty."""
        held = self._held.pop(path)
        held.released.set()
        if _read(path) == held.holder:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for folder in held.created:
                folder.rmdir()


def lock_path(folder: Path, beside: bool = False) -> Path:
    """Return the path of a folder's lock file."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.lock") if beside else folder / LOCK


def require_free(folder: Path, setting: str) -> None:
    """Refuse a folder that another run is writing; take no lock.

    Raises:
        UserError: names the process.
    """
    for path in (lock_path(folder), lock_path(folder, beside=True)):
        if path.exists():
            _require_stale(path, _read(path), f"{setting}={folder}")


def is_held(folder: Path) -> bool:
    """Return whether a run is writing a folder."""
    path = lock_path(folder)
    return path.exists() and not _is_stale(path, _read(path))


def _create(path: Path, where: str) -> Holder:
    """Create a lock file, and its folder, and return its holder; replace a stale lock."""
    process, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    holder = Holder(socket.gethostname(), _pid_namespace(), process, _start_ticks(process) or 0, since, uuid4().hex)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_stale(path, where)
            continue
        except FileNotFoundError:  # the former holder has just removed the folder that it had made
            continue
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(to_json(holder), file)
        except OSError:  # the disk is full; an empty lock would keep others out
            path.unlink(missing_ok=True)
            raise
        return holder


def _remove_stale(path: Path, where: str) -> None:
    """Remove a stale lock; raise a `UserError` if its holder may be alive."""
    holder = _read(path)
    _require_stale(path, holder, where)
    aside = path.with_name(f"{path.name}.{uuid4().hex}{ASIDE}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process removed it first; the first to create a new one wins
        return
    if _read(aside) != holder:  # another process has removed it and created its own in between
        aside.rename(path)
        return
    aside.unlink()
    name = "a process" if holder is None else f"process {holder.process} on {holder.host}"
    print_status(f"{where}: taking over from {name}, which ended without releasing the folder")


def _require_stale(path: Path, holder: Holder | None, where: str) -> None:
    """Raise a `UserError` that names the holder of a lock, unless the lock is stale."""
    if _is_stale(path, holder):
        return
    writer = "another run" if holder is None else f"process {holder.process} on {holder.host} (since {holder.since})"
    raise UserError(
        f"{where}: {writer} is writing there; choose another folder or wait for its end. If it is gone, delete {path}"
    )


def _is_stale(path: Path, holder: Holder | None) -> bool:
    """Return whether the process that holds a lock has ended."""
    if holder is not None and (holder.host, holder.space) == (socket.gethostname(), _pid_namespace()):
        return _start_ticks(holder.process) != holder.started
    return _age(path) > STALE_SECONDS


def _clear_after_the_dead(parent: Path) -> None:
    """Delete the stale locks of other folders below `parent` that are written whole, and what their runs left."""
    for path in parent.glob(".*.lock"):
        holder = _read(path)
        if holder is not None and _is_stale(path, holder):
            clear_leftovers(parent, path.name.removeprefix(".").removesuffix(".lock"))
            path.unlink(missing_ok=True)


def _keep_fresh(path: Path, held: _Held) -> None:
    """Touch a lock until it is released; if it is deleted or taken over, print a warning and end."""
    while not held.released.wait(TOUCH_SECONDS):
        if _read(path) != held.holder:
            print(f"{path}: is no longer this run's; another run may write there: end one of them", file=sys.stderr)
            return
        with suppress(OSError):
            os.utime(path)


def _age(path: Path) -> float:
    """Return the seconds since a file was touched, by the file system's clock; infinite if it no longer exists."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - touched
    except OSError:  # the folder cannot be written, so its lock will not be taken either
        return time.time() - touched


def _read(path: Path) -> Holder | None:
    """Return the holder of a lock; None if the file is absent, empty or damaged."""
    try:
        return from_json(Holder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _pid_namespace() -> str:
    """Return the PID namespace of this process; empty if the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_ticks(process: int) -> int | None:
    """Return the start of a process in clock ticks after boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
