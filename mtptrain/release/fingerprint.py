"""The fingerprint of a backbone, independent of any head in its folder; checkpoints of heads carry it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mtptrain.release.shards import HEAD_PREFIX, Shards, StoredTensor
from mtptrain.run.progress import counted
from mtptrain.run.storage import user_cache, write_json
from mtptrain.run.typed_json import JsonObject

PIECE = 1 << 22  # bytes read at a time
WORTH_REMEMBERING = 1 << 26  # bytes; hashing a smaller file takes a tenth of a second
SETTLED_SECONDS = 60  # a file that changed more recently may change again within one tick of its time stamp
# Keys of config.json that describe a head or the writer of the file, not the backbone.
FOREIGN_KEYS = ("num_nextn_predict_layers", "mtptrain", "transformers_version", "_name_or_path")


def fingerprint(shards: Shards) -> str:
    """Return a hex SHA-256 over the config and every tensor outside `mtp.*`.

    It does not depend on the distribution of tensors over files, so a folder with another head keeps its fingerprint.
    Every weight is read once; the hashes of large files are remembered in the user's cache until the file changes.
    """
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # hashing lets other threads run
        hashed_files = pool.map(lambda file: _file_hashes(shards, file), shards.files())
        for _ in counted(f"fingerprinting the weights in {shards.folder}", shards.files()):
            hashes |= next(hashed_files)
    digest = hashlib.sha256(_backbone_config(shards.folder / "config.json"))
    for name in sorted(hashes):
        entry = shards.entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {hashes[name]}\n".encode())
    return digest.hexdigest()


def known_fingerprint(shards: Shards) -> str | None:
    """Return the fingerprint if no large file has to be hashed for it, else None."""
    large = [file for file in shards.files() if (shards.folder / file).stat().st_size >= WORTH_REMEMBERING]
    return fingerprint(shards) if all(_remembered_hashes(shards, file) is not None for file in large) else None


def _remembered_path(path: Path) -> Path:
    """Return the place of a file's hashes in the user's cache."""
    state = path.stat()
    key = [str(path), state.st_size, state.st_mtime_ns, state.st_ino]
    return user_cache() / "hashes" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _names(shards: Shards, file: str) -> list[str]:
    """Return the names of a file's tensors outside `mtp.*`."""
    return [name for name, entry in shards.entries.items() if entry.file == file and not name.startswith(HEAD_PREFIX)]


def _remembered_hashes(shards: Shards, file: str) -> dict[str, str] | None:
    """Return the hashes of a file that are in the user's cache; None if there are none of this state of the file."""
    with suppress(OSError, ValueError):
        remembered = _remembered_path((shards.folder / file).resolve())
        hashes = json.loads(remembered.read_text(encoding="utf-8"))
        if isinstance(hashes, dict) and hashes.keys() == set(_names(shards, file)):
            return hashes
    return None


def _file_hashes(shards: Shards, file: str) -> dict[str, str]:
    """Return the hash of every tensor of a file outside `mtp.*`, from the cache if the file has not changed."""
    known = _remembered_hashes(shards, file)
    if known is not None:
        return known
    path = (shards.folder / file).resolve()
    state, remembered = path.stat(), _remembered_path(path)
    hashes = {name: tensor_hash(shards.folder, shards.entries[name]) for name in _names(shards, file)}
    if state.st_size >= WORTH_REMEMBERING and time.time() - state.st_mtime > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time only
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_json(remembered, hashes)
    return hashes


def tensor_hash(folder: Path, entry: StoredTensor) -> str:
    """Return the hex SHA-256 of one tensor's stored bytes."""
    digest = hashlib.sha256()
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.begin)
        left = entry.end - entry.begin
        while left > 0:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise OSError(f"{entry.file} ended early")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _backbone_config(path: Path) -> bytes:
    """Return the part of config.json that describes the backbone, as canonical JSON."""
    config: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in FOREIGN_KEYS and not key.startswith("dspark_")}
    if isinstance(kept.get("compress_ratios"), list):  # one more entry for each MTP module
        kept["compress_ratios"] = kept["compress_ratios"][: config.get("num_hidden_layers")]
    return json.dumps(kept, sort_keys=True).encode()
