"""`data=streams`: the stream cache of a training run, complete or, with `data.follow`, still being written."""

from __future__ import annotations

from pathlib import Path

from mtptrain.data.batches import BatchSource
from mtptrain.hidden_cache.consumed import check_unclaimed
from mtptrain.hidden_cache.followed_batches import FollowedBatches, RowSettings
from mtptrain.hidden_cache.growing_cache import GrowingCache, open_streams
from mtptrain.hidden_cache.manifest import StreamCache, check_origin, check_shards, hash_tokenizer
from mtptrain.hidden_cache.reader import HiddenStateBatches, check_row_length
from mtptrain.recipes.session import Session


def stream_cache(session: Session) -> StreamCache:
    """Return the cache at `data.path`; with `data.follow`, wait until it is begun.

    Raises:
        UserError: it is missing, unfinished or damaged.
    """
    return open_streams(session.config.data, session.config.distributed_timeout)


def check_streams(session: Session) -> None:
    """Raise a `UserError` if the cache is of another backbone, has longer pieces, or another run deletes its shards."""
    cache = stream_cache(session)
    check_origin(cache, _origin(session, session.known_fingerprint))
    check_row_length(cache, session.config.data.sequence_length)
    check_unclaimed(cache.folder, _run(session) if session.config.data.follow else None)


def stream_batches(session: Session) -> BatchSource:
    """Return the training batches of the cache.

    Raises:
        UserError: the cache does not fit the run, or a shard of a complete cache is missing or truncated.
    """
    config, backbone, cache = session.config, session.training_backbone, stream_cache(session)
    data, size, dtype = config.data, config.train.batch_size, backbone.model.lm_head.weight.dtype
    check_origin(cache, _origin(session, backbone.fingerprint))
    if data.follow:
        growing = GrowingCache(cache, _run(session), data.delete_consumed)
        settings = RowSettings(data.sequence_length, size, config.seed)
        return FollowedBatches(growing, settings, dtype, config.distributed_timeout)
    check_shards(cache)
    return HiddenStateBatches(cache, data.sequence_length, size, config.seed, dtype)


def describe_streams(session: Session) -> str:
    """Return the line that says which cache is trained on: its size, if it is known, and its held-out share."""
    cache, data = stream_cache(session), session.config.data
    counts = cache.content
    size = f"{counts.documents:,} documents, {counts.tokens:,} tokens of" if counts.documents else "a growing number of"
    then = ""
    if data.follow:
        then = ", shard by shard" + (", which are deleted after use" if data.delete_consumed else "")
    share = f"one document in {cache.identity.data.heldout_every} was held out"
    return f"training on data.path={data.path}: {size} cached streams{then}; {share}"


def _origin(session: Session, fingerprint: str | None) -> dict[str, object]:
    """Return the part of a cache's identity that is the backbone's; without a fingerprint, its sizes and tokenizer."""
    config = session.source.config
    sizes = {"layer": config.num_hidden_layers, "num_streams": config.hc_mult, "width": config.hidden_size}
    origin = {"tokenizer": hash_tokenizer(session.source.tokenizer), **sizes}
    return origin if fingerprint is None else {"backbone": fingerprint, **origin}


def _run(session: Session) -> str:
    """Return the name of the run in the cache that it reads."""
    return str(Path(session.folder.path).resolve())
