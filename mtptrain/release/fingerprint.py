"""The fingerprint of a backbone, independent of any head in its folder; checkpoints of heads carry it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mtptrain.release.shards import HEAD_PREFIX, Shards, StoredTensor

PIECE = 1 << 22  # bytes read at a time
# Keys of config.json that describe a head or the writer of the file, not the backbone.
FOREIGN_KEYS = ("num_nextn_predict_layers", "mtptrain", "transformers_version", "_name_or_path")


def fingerprint(shards: Shards) -> str:
    """Return a hex SHA-256 over the config and every tensor outside `mtp.*`.

    It does not depend on the distribution of tensors over files, so a folder with another head keeps its fingerprint.
    Every weight is read once.
    """
    digest = hashlib.sha256(_backbone_config(shards.folder / "config.json"))
    for name in sorted(name for name in shards if not name.startswith(HEAD_PREFIX)):
        entry = shards.entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {tensor_hash(shards.folder, entry)}\n".encode())
    return digest.hexdigest()


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
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in FOREIGN_KEYS and not key.startswith("dspark_")}
    if isinstance(kept.get("compress_ratios"), list):  # one more entry for each MTP module
        kept["compress_ratios"] = kept["compress_ratios"][: config.get("num_hidden_layers")]
    return json.dumps(kept, sort_keys=True).encode()
