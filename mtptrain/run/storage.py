"""Atomic files and folders: everything is written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the system allows",
}


def disk_full_reason(error: BaseException) -> str | None:
    """Return the reason if a write failed for lack of space; None for any other error.

    safetensors reports the system's error code only in its message; torch.save raises its own error on top of the
    system's.
    """
    cause: BaseException | None = error
    while cause is not None:
        for code, reason in NO_ROOM.items():
            if (isinstance(cause, OSError) and cause.errno == code) or f"(os error {code})" in str(cause):
                return reason
        cause = cause.__cause__ or cause.__context__
    return None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def honour_umask(path: Path) -> None:
    """Give a new file the permissions that the umask allows; safetensors creates private files.

    Links are left alone: they share the permissions of an existing file.
    """
    if path.is_symlink() or path.stat().st_nlink > 1:
        return
    umask = os.umask(0)  # it cannot be read without being set
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def user_cache() -> Path:
    """Return the folder of files that later runs reuse, in the user's cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mtptrain"


def temporary_path(path: Path) -> Path:
    """Return an unused, hidden path beside `path` for incomplete content."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")


def clear_leftovers(folder: Path, name: str | None = None, idle_seconds: float = 0.0) -> None:
    """Delete half-written files and folders of killed runs.

    Args:
        folder: locked by this run, unless `idle_seconds` is long enough for other runs to write.
        name: intended name of the leftovers to delete; None for all.
        idle_seconds: leftovers that have changed since are kept.
    """
    stem, newest = "*" if name is None else glob.escape(name), time.time() - idle_seconds
    for leftover in folder.glob(f".{stem}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(FileNotFoundError):  # its run has just finished it
            if idle_seconds and leftover.stat().st_mtime > newest:
                continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block ends without error, else delete it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        honour_umask(temporary)
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` if the block ends without error, else delete it.

    Args:
        path: the final path.
        replaces: whether an existing folder is replaced; otherwise `path` must be absent or empty.

    Raises:
        FileExistsError: `path` is not empty and `replaces` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, older = temporary_path(path), temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for child in sorted(temporary.rglob("*")):
            if child.is_file():
                honour_umask(child)
                sync_file(child)
        sync_folder(temporary)
        if not replaces and path.exists() and any(path.iterdir()):
            raise FileExistsError(errno.EEXIST, "the folder is not empty", str(path))
        if path.exists():  # moved aside first: a kill during the deletion must not leave half a folder at `path`
            path.rename(older)
        temporary.replace(path)
        sync_folder(path.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically.

    Raises:
        ValueError: `value` holds NaN or infinity, for which JSON has no form.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
