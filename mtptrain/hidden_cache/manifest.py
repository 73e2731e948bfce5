"""The artifact of `+recipe=collect`: a folder of `shard_NNNNN.safetensors` with a manifest; see docs/data.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mtptrain.config import CollectEngine, DataConfig, DataFormat, DataSource, OnBadRow, StreamFormat
from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.hidden_cache.fidelity import Fidelity
from mtptrain.run.artifact import Artifact, Kind, check_identity, is_whole, open_artifact
from mtptrain.run.distributed import max_over_processes

STREAM = "output of the last decoder layer, before hc_head and the final norm"


@dataclass(frozen=True, slots=True)
class TextOrigin:
    """The origin of a cache's documents: the `DataConfig` settings that select them."""

    source: DataSource
    path: str | None
    subset: str | None
    split: str | None
    field_name: str
    format: DataFormat
    on_bad_row: OnBadRow
    packages: list[str]
    max_documents: int | None
    max_tokens: int | None
    heldout_every: int

    @classmethod
    def of(cls, config: DataConfig) -> TextOrigin:
        """Return the origin of the documents that a configuration selects."""
        return cls(**{name: getattr(config, name) for name in cls.__slots__})

    def config(self) -> DataConfig:
        """Return a configuration that selects the same documents."""
        return DataConfig(**{name: getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class StreamIdentity:
    """The identity of a stream cache.

    Attributes:
        backbone: fingerprint of the model that made the streams.
        stream: point of the model where they were taken, in words.
        layer: number of decoder layers before that point.
        num_streams, width: N and D.
        stored_as: format on disk.
        dtype: dtype of the backbone's arithmetic.
        tokenizer: SHA-256 of the tokenizer.
        chat_template: SHA-256 of the conversations' chat template; None if there is no conversation.
        text: SHA-256 of the documents' token ids, boundaries and loss mask.
        sequence_length: maximum length of a piece; longer documents are cut, tokens.
        shard_tokens: a shard ends with the document that reaches this number of tokens.
        data: origin of the documents, to find held-out documents of the same source.
        engine: program that ran the model.
    """

    backbone: str
    stream: str
    layer: int
    num_streams: int
    width: int
    stored_as: StreamFormat
    dtype: str
    tokenizer: str
    chat_template: str | None
    text: str
    sequence_length: int
    shard_tokens: int
    data: TextOrigin
    engine: CollectEngine = CollectEngine.transformers


@dataclass(frozen=True, slots=True)
class StreamContent:
    """The content of a stream cache.

    Attributes:
        documents, pieces, tokens: of all shards.
        fidelity: agreement of another engine with transformers; None if transformers made the streams.
    """

    documents: int
    pieces: int
    tokens: int
    fidelity: Fidelity | None = None


StreamCache = Artifact[StreamIdentity, StreamContent]
STREAM_CACHE: Kind[StreamIdentity, StreamContent] = Kind(
    name="stream cache",
    schema=2,
    identity=StreamIdentity,
    content=StreamContent,
    settings={
        **dict.fromkeys(("backbone", "stream", "layer", "num_streams", "width", "tokenizer"), BACKBONE_CHOICE),
        "stored_as": "collect.format",
        "dtype": "precision",
        "chat_template": "data.chat_template",
        "text": "data",
        "sequence_length": "data.sequence_length",
        "shard_tokens": "collect.shard_tokens",
        "data": "data",
        "engine": "collect.engine",
    },
    missing="give the folder of +recipe=collect, and let it finish with resume=auto if it was interrupted",
    damaged="collect the streams anew",
    repair="restore it, or delete it and the manifest and collect again with resume=auto",
)


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the SHA-256, in hexadecimal, of everything in the tokenizer that affects how a text is encoded."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def open_cache(folder: Path) -> StreamCache:
    """Return the complete cache at `data.path` without verifying its shards.

    Raises:
        UserError: the cache is missing, unfinished or damaged.
    """
    return open_artifact(STREAM_CACHE, "data.path", folder)


def check_origin(cache: StreamCache, want: Mapping[str, object]) -> None:
    """Raise a `UserError` unless a cache was made with a backbone of these fields of `StreamIdentity`."""
    have = {name: getattr(cache.identity, name) for name in want}
    check_identity(cache.where, have, want, dict.fromkeys(want, BACKBONE_CHOICE), "collect anew")


def check_shards(cache: StreamCache) -> None:
    """Raise a `UserError`, on every process, that names a shard that is missing or truncated where a process sees it.

    Altered shards are found when they are read first: hashing a large cache would take hours.
    """
    names = list(cache.files)
    damaged = [number for number, name in enumerate(names) if not is_whole(cache.folder, name, cache.files[name])]
    named = max_over_processes(max(damaged, default=-1))
    if named >= 0:
        raise cache.damage(names[named])
