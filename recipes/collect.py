"""`+recipe=collect`: store the backbone's residual streams of a text, to train from with `data=streams`.

python -m mtptrain +recipe=collect --plan
python -m mtptrain +recipe=collect output_dir=streams
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import backbone_streams
from mtptrain.batch import Batch
from mtptrain.config import PARTITIONED_PLACEMENTS, RunConfig, require
from mtptrain.config.data import require_documents
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_training_text, settings
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.hidden_cache.consumed import deleted_bytes, written_shards
from mtptrain.hidden_cache.format import bytes_a_token
from mtptrain.hidden_cache.manifest import (
    STREAM,
    STREAM_CACHE,
    StreamIdentity,
    TextOrigin,
    hash_tokenizer,
    shard_file,
)
from mtptrain.hidden_cache.writer import (
    ShardDocuments,
    num_forwards,
    piece_streams,
    plan_shards,
    write_shard,
)
from mtptrain.recipes.session import Session
from mtptrain.run.artifact import begin, finish, is_begun, total_counts
from mtptrain.run.distributed import max_over_processes, on_rank0, rank, world_size
from mtptrain.run.folder import FolderUse, RunFolder
from mtptrain.run.preemption import StopRequest
from mtptrain.run.progress import Progress

FOLDER = FolderUse.own
PROCESSES = "any"
TEXT_BYTES = 5  # int32 token id and one byte of loss mask


def reads(config: RunConfig) -> Settings:
    """Return the settings that a collection reads."""
    return ALWAYS | of_training_text(config) | settings("collect") | of_backbone(config) - {"seed"}


def check(config: RunConfig) -> None:
    """Refuse data that is streamed or is no text."""
    require_documents(config.data, config.task)
    rule = "collect counts the tokens before it starts; leave it false"
    require(not config.data.streaming, "data.streaming", True, rule)


def check_disk(session: Session, shards: list[ShardDocuments]) -> None:
    """Print the disk space that the cache needs.

    Raises:
        UserError: less is free, unless `collect.plan_only` is set.
    """
    config, run_folder, model = session.config, session.folder, session.source.config
    stored_as = config.collect.format
    token_bytes = bytes_a_token(stored_as, model.hc_mult, model.hidden_size)
    tokens = sum(size for documents in shards for pieces in documents for _, size in pieces)
    need = tokens * (token_bytes + TEXT_BYTES)
    path = run_folder.path.absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    stored = sum(file.stat().st_size for file in path.glob("shard_*.safetensors")) + deleted_bytes(path)
    free = shutil.disk_usage(nearest).free + stored
    run_folder.print_status(
        f"{tokens:,} tokens in {sum(map(len, shards)):,} documents and {len(shards)} shards; "
        f"{model.hc_mult} streams of {model.hidden_size} channels as {stored_as.value}: "
        f"{token_bytes / 1024:.2f} KiB a token"
    )
    run_folder.print_status(f"disk: {need / 1e9:.3f} GB needed, {free / 1e9:.1f} GB free at {nearest}")
    if need > free and not config.collect.plan_only:
        raise UserError(
            f"output_dir={run_folder.path}: the cache needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another disk, or set collect.format=fp8"
        )


def describe_streams(session: Session, corpus: TokenizedCorpus) -> StreamIdentity:
    """Return the identity of this run's cache."""
    config, source, chat = session.config, session.source, session.chat
    return StreamIdentity(
        backbone=session.fingerprint,
        stream=STREAM,
        layer=source.config.num_hidden_layers,
        num_streams=source.config.hc_mult,
        width=source.config.hidden_size,
        stored_as=config.collect.format,
        dtype=session.dtype_name,
        tokenizer=hash_tokenizer(source.tokenizer),
        chat_template=chat.sha256 if chat is not None and corpus.loss_mask is not None else None,
        text=corpus.digest(),
        sequence_length=session.piece_length,
        shard_tokens=config.collect.shard_tokens,
        data=TextOrigin.of(config.data),
    )


def is_continued(run_folder: RunFolder) -> bool:
    """Return whether the folder holds an interrupted cache to continue.

    Raises:
        UserError: it holds a cache, and `resume=auto` is not set.
    """
    folder, is_resumed = run_folder.path, run_folder.config.resume == "auto"
    if is_begun(folder) and not is_resumed:
        raise UserError(f"output_dir={folder}: already holds a stream cache; choose another, or set resume=auto")
    if is_resumed and not is_begun(folder):
        run_folder.print_status(f"resume=auto: {folder} holds no shard to continue from; starting at the first")
    return is_begun(folder)


def begin_cache(session: Session, identity: StreamIdentity, is_old: bool) -> None:
    """Compare an interrupted cache with this run before the backbone is loaded; begin a new one only after that.

    Raises:
        UserError: the folder holds another cache or other files.
    """
    if not is_old:  # a backbone that cannot be loaded leaves no begun cache
        _ = session.backbone
    on_rank0(lambda: begin(STREAM_CACHE, "output_dir", session.folder.path, identity, making=None))
    _ = session.backbone


def collect_shards(session: Session, corpus: TokenizedCorpus, shards: list[ShardDocuments]) -> None:
    """Write the missing shards, divided among the processes.

    Raises:
        Preempted: a signal asked the run to stop; finished shards are kept.
    """
    folder, length, model = session.folder.path, session.piece_length, session.backbone.model
    names = [shard_file(number) for number in range(len(shards))]
    written = on_rank0(lambda: set(written_shards(folder, len(shards))))
    missing = [number for number, name in enumerate(names) if name not in written]
    if len(missing) < len(shards):
        session.folder.print_status(f"continuing: {len(shards) - len(missing)} of {len(shards)} shards are there")
    rank_shards = missing[rank() :: world_size()]
    forwards = sum(num_forwards(shards[number], length) for number in rank_shards)
    padding = max_over_processes(forwards) - forwards  # before the first forward, which is collective itself
    # A shared backbone needs all processes at every forward, so none may stop by itself: a signal ends them all.
    is_shared = session.config.backbone.placement in PARTITIONED_PLACEMENTS
    stop = StopRequest("shard")
    with Progress("collect", len(rank_shards)) as progress, nullcontext() if is_shared else stop:
        for done, number in enumerate(rank_shards, start=1):
            pieces = [piece for parts in shards[number] for piece in parts]
            streams_TND = piece_streams(model, corpus, pieces, length)
            write_shard(folder, number, shards[number], corpus, streams_TND, session.config.collect.format)
            progress.update(done, "shards", len(streams_TND))
            if stop.is_made:
                break
    if not stop.is_made:
        pad_forwards(model, padding)
    if max_over_processes(int(stop.is_made)):  # a barrier, too: all shards are written
        num_kept = on_rank0(lambda: len(written_shards(folder, len(shards))))
        raise stop.ending(f"{num_kept} of {len(names)} shards are kept")


def pad_forwards(model: DeepseekV4ForCausalLM, count: int) -> None:
    """Run forwards for nothing: every rank runs the same number, since a shared backbone needs all ranks."""
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device)
    for _ in range(count):
        backbone_streams(model, Batch(token_11, token_11 + 1, token_11))


def finish_cache(folder: Path, identity: StreamIdentity, num_shards: int) -> None:
    """Write the manifest once all shards exist."""
    shards = written_shards(folder, num_shards)
    assert len(shards) == num_shards
    finish(STREAM_CACHE, folder, identity, shards, total_counts(shards))


def run(session: Session) -> None:
    """Plan the shards, check the disk, write the shards and then the manifest."""
    config, run_folder = session.config, session.folder
    if not config.collect.plan_only:
        on_rank0(run_folder.take)
    corpus = session.training_corpus
    shards = plan_shards(corpus, session.piece_length, config.collect.shard_tokens)
    if not shards:
        raise UserError("data: there is no document with two tokens or more to run over; check data.path")
    on_rank0(lambda: check_disk(session, shards))
    if config.collect.plan_only:
        return
    is_old = on_rank0(lambda: is_continued(run_folder))
    identity = describe_streams(session, corpus)
    begin_cache(session, identity, is_old)
    run_folder.record()
    with torch.inference_mode():
        collect_shards(session, corpus, shards)

    on_rank0(lambda: finish_cache(run_folder.path, identity, len(shards)))
    run_folder.print_status(f"wrote {run_folder.path}; train from it with data=streams data.path={run_folder.path}")
