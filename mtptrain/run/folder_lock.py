"""One writer per folder: a lock file names the process that writes, and the lock of a killed process is taken over.

The lock is a small JSON file, created with O_EXCL, which also works on shared file systems. Its holder touches it every
`TOUCH_SECONDS`. A lock is stale, and another process may take it over, if

- it was written on this machine and its process has ended, or
- it was written on another machine, or cannot be read, and has not been touched for `STALE_SECONDS`.

The clocks of machines that share a folder must agree to within a minute or two. A process in another container counts
as a process on another machine.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mtptrain.errors import UserError
from mtptrain.run.storage import clear_leftovers
from mtptrain.run.typed_json import from_json, to_json

LOCK = "run.lock"
TOUCH_SECONDS, STALE_SECONDS = 30.0, 300.0


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


class FolderLock:
    """Locks on all folders that a run writes; only rank 0 takes them.

    The lock file is in the folder, or beside it if the folder gets its name only once it is complete.
    """

    def __init__(self) -> None:
        self._held: dict[Path, tuple[Holder, threading.Event]] = {}

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
        path.parent.mkdir(parents=True, exist_ok=True)
        holder, released = _create(path, f"{setting}={folder}"), threading.Event()
        self._held[path] = (holder, released)
        threading.Thread(target=_keep_fresh, args=(path, holder, released), daemon=True).start()
        if beside:
            clear_leftovers(folder.parent, folder.name)
        else:
            for part in (folder, *(one for one in folder.iterdir() if one.is_dir())):
                clear_leftovers(part)

    def release(self, folder: Path, beside: bool = False) -> None:
        """Release the lock of one folder."""
        self._release(lock_path(folder, beside))

    def close(self) -> None:
        """Release all locks."""
        for path in list(self._held):
            self._release(path)

    def _release(self, path: Path) -> None:
        holder, released = self._held.pop(path)
        released.set()
        if _read(path) == holder:
            path.unlink(missing_ok=True)


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


def _create(path: Path, where: str) -> Holder:
    """Create a lock file and return its holder; replace a stale one."""
    process, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    holder = Holder(socket.gethostname(), _pid_namespace(), process, _start_ticks(process) or 0, since, uuid4().hex)
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_stale(path, where)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(to_json(holder), file)
        return holder


def _remove_stale(path: Path, where: str) -> None:
    """Remove a stale lock; raise a `UserError` if its holder may be alive."""
    holder = _read(path)
    _require_stale(path, holder, where)
    aside = path.with_name(f"{path.name}.{uuid4().hex}.stale")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process removed it first; the first to create a new one wins
        return
    if _read(aside) != holder:  # another process has removed it and created its own in between
        aside.rename(path)
        return
    aside.unlink()
    name = "a process" if holder is None else f"process {holder.process} on {holder.host}"
    print(f"{where}: taking over from {name}, which ended without releasing the folder", file=sys.stderr, flush=True)


def _require_stale(path: Path, holder: Holder | None, where: str) -> None:
    """Raise a `UserError` that names the holder of a lock, unless the lock is stale."""
    if holder is not None and (holder.host, holder.space) == (socket.gethostname(), _pid_namespace()):
        is_stale = _start_ticks(holder.process) != holder.started
    else:
        is_stale = _age(path) > STALE_SECONDS
    if not is_stale:
        writer = (
            "another run" if holder is None else f"process {holder.process} on {holder.host} (since {holder.since})"
        )
        raise UserError(
            f"{where}: {writer} is writing there; choose another folder or wait for its end. If it is gone, delete "
            f"{path}"
        )


def _keep_fresh(path: Path, holder: Holder, released: threading.Event) -> None:
    """Touch a lock until it is released or another process has taken it over."""
    while not released.wait(TOUCH_SECONDS):
        if _read(path) != holder:
            return
        with suppress(OSError):
            os.utime(path)


def _age(path: Path) -> float:
    """Return the seconds since a file was touched; infinite if it no longer exists."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


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
