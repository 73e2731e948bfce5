"""What a stream cache is: its manifest, and how one is refused.

A cache is a folder of `shard_NNNNN.safetensors` and `manifest.json`; docs/data.md describes both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mtptrain.config import DataConfig, DataSource
from mtptrain.distributed import largest_over_processes, rank, world_size
from mtptrain.errors import UserError
from mtptrain.storage import sha256_file, write_json

MANIFEST, SCHEMA = "manifest.json", 1
STREAM = "output of the last decoder layer, before hc_head and the final norm"
TEXT_SETTINGS = ("path", "field_name", "packages", "heldout_every")  # of DataConfig, beside the source


@dataclass(frozen=True, slots=True)
class StreamIdentity:
    """What the streams of a cache are; a cache that differs in any of it is another one.

    Attributes:
        backbone: fingerprint of the model that made them.
        stream: which of its tensors they are.
        layer: after how many decoder layers.
        num_streams, width: N and D.
        stored_as: a `StreamFormat`.
        dtype: of the backbone's arithmetic.
        tokenizer: SHA-256 of the tokenizer.
        chat_template: SHA-256 of the template that conversations were rendered with.
        text: SHA-256 of the documents' token ids and of which may be targets.
        sequence_length: longest piece of a document that went through the backbone at once, tokens.
        shard_tokens: a shard ends with the document that reaches it.
        data: where the documents came from, for the held-out ones of the same source.
    """

    backbone: str
    stream: str
    layer: int
    num_streams: int
    width: int
    stored_as: str
    dtype: str
    tokenizer: str
    chat_template: str | None
    text: str
    sequence_length: int
    shard_tokens: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file of a cache: its checksum, and how much it holds."""

    file: str
    sha256: str
    bytes: int
    documents: int
    pieces: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StreamManifest:
    """A whole cache."""

    folder: Path
    identity: StreamIdentity
    shards: list[ShardEntry]

    def text_config(self) -> DataConfig:
        """The settings of the documents that the cache was made of."""
        data = dict(self.identity.data)
        return DataConfig(source=DataSource(data.pop("source")), **data)


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of everything that decides which tokens a text becomes."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def text_settings(config: DataConfig) -> dict[str, Any]:
    """What a manifest records of where documents came from."""
    return {"source": config.source.value, **{name: getattr(config, name) for name in TEXT_SETTINGS}}


def write_manifest(folder: Path, identity: StreamIdentity, shards: list[ShardEntry]) -> None:
    """Write `manifest.json`, which makes the cache a whole one."""
    counts = {name: sum(getattr(shard, name) for shard in shards) for name in ("documents", "pieces", "tokens")}
    entries = [asdict(shard) for shard in shards]
    write_json(folder / MANIFEST, {"schema": SCHEMA, **asdict(identity), **counts, "shards": entries})


def read_manifest(folder: Path) -> StreamManifest:
    """The manifest of a cache.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema = stored["schema"]
        identity = StreamIdentity(**{name: stored[name] for name in StreamIdentity.__slots__})
        shards = [ShardEntry(**entry) for entry in stored["shards"]]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"data.path={folder}: holds no {MANIFEST}; give the folder of +recipe=collect, and let it finish with "
            "resume=auto if it was interrupted"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.path={folder}: {MANIFEST} is damaged ({error}); collect the streams anew") from None
    if schema != SCHEMA:
        raise UserError(f"data.path={folder}: has schema {schema} and this version of mtptrain reads {SCHEMA}")
    return StreamManifest(folder, identity, shards)


def check_origin(manifest: StreamManifest, backbone: str, tokenizer: str) -> None:
    """Raise a `UserError` unless a cache was made by this backbone and this tokenizer."""
    for name, wanted in (("backbone", backbone), ("tokenizer", tokenizer)):
        found = getattr(manifest.identity, name)
        if found != wanted:
            raise UserError(
                f"data.path={manifest.folder}: holds streams of the {name} {found[:12]} and this run has "
                f"{wanted[:12]}; set backbone.path to the one it belongs to, or collect anew"
            )


def check_shards(manifest: StreamManifest) -> None:
    """Raise a `UserError` that names a shard which is missing or altered: every process checks its share, all raise."""
    own = range(rank(), len(manifest.shards), world_size())
    damaged = [number for number in own if not _is_whole(manifest.folder, manifest.shards[number])]
    named = largest_over_processes(max(damaged, default=-1))
    if named >= 0:
        raise UserError(
            f"data.path={manifest.folder}: {manifest.shards[named].file} is missing, truncated or altered (its SHA-256 "
            "differs); restore it, or delete it and the manifest and collect again with resume=auto"
        )


def _is_whole(folder: Path, shard: ShardEntry) -> bool:
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256
