"""Artifacts: folders with an identity, checksums and a manifest. The manifest is written last and completes the folder.

A folder written at once (`seal`, inside `atomic_folder`) is whole or absent. A folder written part by part (`begin`,
`add_part`, `finish`) can be continued after an interruption: `begun.json` keeps its identity, and each part gets a
record, `PART.json`, once the part is on disk. The writer holds the folder's lock (folder_lock.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mtptrain.errors import UserError
from mtptrain.run.folder_lock import LOCK
from mtptrain.run.storage import sha256_file, write_json
from mtptrain.run.typed_json import MismatchError, from_json, to_json

Identity = TypeVar("Identity")
Content = TypeVar("Content")
Making = TypeVar("Making")
BEGUN = "begun.json"
HASHED_AT_ONCE = 4  # files; hashing a file holds no lock of Python
HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[Identity, Content]):
    """A kind of artifact.

    Attributes:
        name: such as `checkpoint`.
        schema: version of its files; other versions are refused.
        identity: type of the identity.
        content: type of everything else in the manifest.
        settings: fields of the identity that must match those of the run, each with the setting that determines it.
        manifest: file name of the manifest.
        missing, damaged, repair: way out in the error message if the manifest is missing, the manifest is damaged, or
            a file is damaged.
    """

    name: str
    schema: int
    identity: Any  # a dataclass, or a union of them
    content: Any
    settings: Mapping[str, str]
    manifest: str = "manifest.json"
    missing: str
    damaged: str
    repair: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an artifact.

    Attributes:
        bytes: its size.
        sha256: its checksum in hexadecimal.
        counts: of its content, such as rows or tokens.
    """

    bytes: int
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact(Generic[Identity, Content]):
    """A complete artifact. Its files are not verified yet.

    Attributes:
        kind: of the artifact.
        where: setting and path of the folder, as error messages begin.
        folder: its path.
        identity: decides which runs may use the artifact.
        files: by name, in the order of the manifest.
        content: everything else in the manifest.
    """

    kind: Kind[Identity, Content]
    where: str
    folder: Path
    identity: Identity
    files: dict[str, StoredFile]
    content: Content

    def is_intact(self, name: str) -> bool:
        """Return whether a file is listed, present and unaltered; this reads the whole file."""
        stored, path = self.files.get(name), self.folder / name
        if stored is None or not path.is_file() or path.stat().st_size != stored.bytes:
            return False
        return sha256_file(path) == stored.sha256

    def verify(self, names: Iterable[str]) -> None:
        """Check files by their checksums.

        Raises:
            UserError: names the first of `names` that is not sound.
        """
        names = list(names)
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            for name, is_intact in zip(names, pool.map(self.is_intact, names), strict=True):
                if not is_intact:
                    raise self.damage(name)

    def damage(self, name: str) -> UserError:
        """Return the error for a file that is not sound."""
        reason = "missing, truncated or altered (its SHA-256 differs)"
        return UserError(f"{self.where}: {name} is {reason}; {self.kind.repair}")


def open_artifact(kind: Kind[Identity, Content], setting: str, folder: Path) -> Artifact[Identity, Content]:
    """Return a complete artifact from its manifest.

    Args:
        kind: the expected kind.
        setting: name of the setting that gave the folder.
        folder: of the artifact.

    Raises:
        UserError: the manifest is missing, damaged, or of another kind or schema.
    """
    where = f"{setting}={folder}"
    identity, files, content = _read(
        kind, where, folder / kind.manifest, identity=kind.identity, files=dict[str, StoredFile], content=kind.content
    )
    return Artifact(kind, where, folder, identity, files, content)


def seal(
    kind: Kind[Identity, Content], folder: Path, identity: Identity, content: Content, names: Iterable[str]
) -> None:
    """Write the manifest of a complete folder, with checksums of the files `names`."""
    files = {name: describe_file(folder / name) for name in names}
    _write_manifest(kind, folder, identity, files, content)


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds an artifact written part by part, complete or not."""
    return (folder / BEGUN).exists()


def begin(kind: Kind[Identity, Content], setting: str, folder: Path, identity: Identity, making: Making) -> Making:
    """Begin an artifact, or continue one that an interrupted run began.

    Args:
        kind: of the artifact.
        setting: name of the setting that gave the folder.
        folder: locked by this run.
        identity: of the artifact.
        making: choices that shape the parts without being part of the identity; a dataclass or None.

    Returns:
        The `making` with which the artifact was begun: all its parts must be made in the same way.

    Raises:
        UserError: the folder holds another artifact or other files.
    """
    path, where = folder / BEGUN, f"{setting}={folder}"
    if not path.exists():
        if any(other.name != LOCK for other in folder.iterdir()):
            raise UserError(f"{where}: holds other files than a {kind.name}; choose an empty or a new folder")
        content = {"identity": to_json(identity), "making": to_json(making)}
        write_json(path, {"kind": kind.name, "schema": kind.schema, **content})
        return making
    stored, begun = _read(kind, where, path, identity=kind.identity, making=type(making))
    check_identity(where, stored, identity, kind.settings)
    return begun


def add_part(folder: Path, name: str, counts: dict[str, int]) -> None:
    """Record a part once its file is on disk.

    Args:
        folder: of the artifact.
        name: of the part's file.
        counts: of its content.
    """
    write_json(_record(folder, name), to_json(describe_file(folder / name, counts)))


def read_begun(kind: Kind[Identity, Content], setting: str, folder: Path) -> Identity:
    """Return the identity of an artifact that may still be written, from `begun.json`.

    Raises:
        UserError: that file is missing, damaged, or of another kind or schema.
    """
    identity: Identity
    (identity,) = _read(kind, f"{setting}={folder}", folder / BEGUN, identity=kind.identity)
    return identity


def read_part(folder: Path, name: str) -> StoredFile | None:
    """Return the record of a part, which is written after its file; None if there is none that can be read."""
    try:
        return from_json(StoredFile, json.loads(_record(folder, name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def is_whole(folder: Path, name: str, stored: StoredFile) -> bool:
    """Return whether a file is there with the recorded size."""
    try:
        return (folder / name).stat().st_size == stored.bytes
    except OSError:
        return False


def find_parts(folder: Path, names: Iterable[str], deleted: Collection[str] = ()) -> dict[str, StoredFile]:
    """Return the parts among `names` that were written, by name: each has a record and a file of the recorded size.

    Args:
        folder: of the artifact.
        names: of the parts' files.
        deleted: files that were deleted after use; their records are enough.
    """
    records = {name: read_part(folder, name) for name in names}
    parts = {name: part for name, part in records.items() if part is not None}
    return {name: part for name, part in parts.items() if name in deleted or is_whole(folder, name, part)}


def finish(
    kind: Kind[Identity, Content], folder: Path, identity: Identity, files: dict[str, StoredFile], content: Content
) -> None:
    """Write the manifest, which completes the folder; keep a manifest that exists already.

    Args:
        kind: of the artifact.
        folder: holds all parts.
        identity: of the artifact.
        files: the parts, in reading order.
        content: everything else in the manifest.
    """
    if not (folder / kind.manifest).exists():
        _write_manifest(kind, folder, identity, files, content)


def total_counts(files: Mapping[str, StoredFile]) -> dict[str, int]:
    """Return the sum of each count over all files."""
    totals: dict[str, int] = {}
    for stored in files.values():
        for name, count in stored.counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def check_identity(
    where: str, have: object, want: object, settings: Mapping[str, str], way_out: str = "choose another folder"
) -> None:
    """Refuse an artifact whose identity differs from that of this run.

    Args:
        where: setting and path of the artifact.
        have: the stored identity, a dataclass or a dict.
        want: the identity of this run.
        settings: fields to compare, each with the setting that determines it.
        way_out: alternative to matching the settings.

    Raises:
        UserError: lists every difference.
    """
    stored, wanted = _flatten(have, settings), _flatten(want, settings)
    names = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if type(have) is not type(want):
        names = [name for name in names if name in stored and name in wanted] or names
    if not names:
        return
    parts = (", ".join(f"{name}={_short(values.get(name))}" for name in names) for values in (stored, wanted))
    sources = ", ".join(dict.fromkeys(settings[name.split(".")[0]] for name in names))
    raise UserError(
        f"{where}: holds {next(parts)} and this run has {next(parts)}; set {sources} to match, or {way_out}"
    )


def _flatten(identity: object, settings: Mapping[str, str]) -> dict[str, object]:
    """Return the compared fields as JSON values by dotted name."""
    values = to_json(identity)
    flat: dict[str, object] = {}
    for name in settings:
        value = values.get(name) if name in values else None
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": part for key, part in value.items()})
        elif name in values:
            flat[name] = value
    return flat


def _short(value: object) -> object:
    """Return the first 12 digits of a SHA-256, and any other value unchanged."""
    return value[:12] if isinstance(value, str) and HASH.fullmatch(value) else value


def _record(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".json")


def describe_file(path: Path, counts: dict[str, int] | None = None) -> StoredFile:
    """Return size and checksum of a file, with the counts of its content."""
    return StoredFile(path.stat().st_size, sha256_file(path), counts or {})


def _write_manifest(
    kind: Kind[Identity, Content], folder: Path, identity: Identity, files: dict[str, StoredFile], content: Content
) -> None:
    parts = {"identity": identity, "content": content, "files": files}
    write_json(folder / kind.manifest, {"kind": kind.name, "schema": kind.schema, **to_json(parts)})


def _read(kind: Kind[Any, Any], where: str, path: Path, **types: Any) -> list[Any]:
    """Return the entries of a manifest or `begun.json` that `types` names, decoded and checked by type."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema, name = stored.get("schema", stored.get("format")), stored.get("kind", kind.name)
        if schema is None:
            raise MismatchError("it has no schema")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where}: holds no {path.name}; {kind.missing}") from None
    except (OSError, ValueError, AttributeError) as error:  # ValueError: not UTF-8, not JSON, no schema
        raise UserError(f"{where}: {path.name} is damaged ({error}); {kind.damaged}") from None
    if name != kind.name:
        raise UserError(f"{where}: is of the kind {name!r} and not {kind.name!r}; {kind.missing}")
    if schema != kind.schema:
        raise UserError(
            f"{where}: has schema {schema} and this version of mtptrain reads {kind.schema}; use the version that "
            "wrote it"
        )
    try:
        return [from_json(type_, stored[part]) for part, type_ in types.items()]
    except (KeyError, MismatchError) as error:
        raise UserError(f"{where}: {path.name} is damaged ({error}); {kind.damaged}") from None
