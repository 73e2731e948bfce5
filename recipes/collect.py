"""`+recipe=collect`: store the backbone's residual streams of a text, to train from with `data=streams`.

python -m mtptrain +recipe=collect --plan
python -m mtptrain +recipe=collect output_dir=streams
python -m mtptrain +recipe=collect collect.engine=vllm backbone.path=flash output_dir=streams
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from mtptrain.backbone.streams import backbone_streams
from mtptrain.batch import Batch
from mtptrain.config import PARTITIONED_PLACEMENTS, CollectEngine, RunConfig, require
from mtptrain.config.data import require_documents
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_collecting, of_documents
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import UserError
from mtptrain.hidden_cache.consumed import deleted_bytes, written_shards
from mtptrain.hidden_cache.fidelity import (
    Fidelity,
    Readout,
    check_fidelity,
    describe_fidelity,
    gate_pieces,
    measure_fidelity,
)
from mtptrain.hidden_cache.format import bytes_a_token, shard_file
from mtptrain.hidden_cache.manifest import (
    STREAM,
    STREAM_CACHE,
    StreamContent,
    StreamIdentity,
    TextOrigin,
    hash_tokenizer,
)
from mtptrain.hidden_cache.vllm_engine import DTYPE, VLLM, check_vllm, open_vllm
from mtptrain.hidden_cache.writer import (
    ShardDocuments,
    num_forwards,
    piece_streams,
    plan_shards,
    write_shard,
)
from mtptrain.recipes.session import Session
from mtptrain.run.artifact import begin, check_identity, finish, is_begun, read_begun, total_counts
from mtptrain.run.distributed import max_over_processes, on_rank0, rank, world_size
from mtptrain.run.folder import FolderUse, RunFolder
from mtptrain.run.preemption import StopRequest
from mtptrain.run.progress import Progress

FOLDER = FolderUse.own
PROCESSES = "any"
TEXT_BYTES = 5  # int32 token id and one byte of loss mask


@dataclass(frozen=True, slots=True)
class Collector:
    """What makes the shards.

    Attributes:
        write: writes the shard of a number and returns its tokens.
        fidelity: agreement with transformers; None if transformers itself runs the backbone.
    """

    write: Callable[[int], int]
    fidelity: Fidelity | None = None


def reads(config: RunConfig) -> Settings:
    """Return the settings that a collection reads."""
    return ALWAYS | of_documents(config) | of_collecting(config) | of_backbone(config) - {"seed"}


def check(config: RunConfig) -> None:
    """Refuse data that is streamed or is no text, and a backbone shared by processes beside vLLM."""
    require_documents(config.data, config.task)
    placement, is_vllm = config.backbone.placement, config.collect.engine is CollectEngine.vllm
    rule = "collect.engine=vllm runs in one process and compares with a whole backbone; set auto or replicate"
    require(not (is_vllm and placement in PARTITIONED_PLACEMENTS), "backbone.placement", placement.value, rule)


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


def describe_streams(session: Session, corpus: TokenizedCorpus, backbone: str) -> StreamIdentity:
    """Return the identity of this run's cache; `backbone` is the fingerprint."""
    config, source, chat = session.config, session.source, session.chat
    engine = config.collect.engine
    return StreamIdentity(
        backbone=backbone,
        stream=STREAM,
        layer=source.config.num_hidden_layers,
        num_streams=source.config.hc_mult,
        width=source.config.hidden_size,
        stored_as=config.collect.format,
        dtype=DTYPE if engine is CollectEngine.vllm else session.dtype_name,
        tokenizer=hash_tokenizer(source.tokenizer),
        chat_template=chat.sha256 if chat is not None and corpus.loss_mask is not None else None,
        text=corpus.digest(),
        sequence_length=session.piece_length,
        shard_tokens=config.collect.shard_tokens,
        data=TextOrigin.of(config.data),
        engine=engine,
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


def check_begun(session: Session, corpus: TokenizedCorpus) -> None:
    """Refuse an interrupted cache of another run before weights are read, which an unknown fingerprint needs."""
    folder, known = session.folder.path, session.known_fingerprint
    stored = on_rank0(lambda: read_begun(STREAM_CACHE, "output_dir", folder))
    want = describe_streams(session, corpus, known or stored.backbone)
    check_identity(f"output_dir={folder}", stored, want, STREAM_CACHE.settings)


def begin_cache(
    session: Session, identity: StreamIdentity, is_old: bool, open_collector: Callable[[], Collector]
) -> Collector:
    """Compare an interrupted cache with this run before the backbone is loaded; begin a new one only after that.

    Raises:
        UserError: the folder holds another cache or other files.
    """
    # A backbone that cannot be loaded, or an engine that is refused, leaves no begun cache.
    opened = None if is_old else open_collector()
    on_rank0(lambda: begin(STREAM_CACHE, "output_dir", session.folder.path, identity, making=None))
    return opened or open_collector()


def transformers_collector(session: Session, corpus: TokenizedCorpus, shards: list[ShardDocuments]) -> Collector:
    """Load the backbone, and return what makes shards with it."""
    folder, length, model = session.folder.path, session.piece_length, session.backbone.model

    def write(number: int) -> int:
        pieces = [piece for parts in shards[number] for piece in parts]
        streams_TND = piece_streams(model, corpus, pieces, length)
        write_shard(folder, number, shards[number], corpus, streams_TND, session.config.collect.format)
        return len(streams_TND)

    return Collector(write)


def vllm_collector(
    session: Session, corpus: TokenizedCorpus, shards: list[ShardDocuments], tensor_parallel: int
) -> Collector:
    """Compare vLLM with the loaded backbone, which leaves the GPU before vLLM starts; return what makes shards with it.

    Raises:
        UserError: vLLM's streams are not those of the backbone.
    """
    collect, source, length = session.config.collect, session.source, session.piece_length
    model = session.backbone.model
    pieces = gate_pieces(shards)
    expected = [piece_streams(model, corpus, [piece], length) for piece in pieces]
    readout = Readout(model)
    del model, session.backbone
    gc.collect()
    torch.cuda.empty_cache()
    engine = open_vllm(source.folder, source.config, tensor_parallel, length)
    folder = session.folder.path
    actual = (engine.piece_streams(corpus, piece, folder) for piece in pieces)
    fidelity = measure_fidelity(f"vLLM {VLLM}", zip(expected, actual, strict=True), readout)
    check_fidelity(fidelity, collect)
    session.folder.print_status(describe_fidelity(fidelity))
    return Collector(
        lambda number: engine.write_shard(folder, number, shards[number], corpus, collect.format), fidelity
    )


def collect_shards(session: Session, shards: list[ShardDocuments], collector: Collector) -> None:
    """Write the missing shards, divided among the processes.

    Raises:
        Preempted: a signal asked the run to stop; finished shards are kept.
    """
    folder, length = session.folder.path, session.piece_length
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
            progress.update(done, "shards", collector.write(number))
            if stop.is_made:
                break
    if not stop.is_made:
        pad_forwards(session, padding)
    if max_over_processes(int(stop.is_made)):  # a barrier, too: all shards are written
        num_kept = on_rank0(lambda: len(written_shards(folder, len(shards))))
        raise stop.ending(f"{num_kept} of {len(names)} shards are kept")


def pad_forwards(session: Session, count: int) -> None:
    """Run forwards for nothing: every rank runs the same number, since a shared backbone needs all ranks."""
    for _ in range(count):
        model = session.backbone.model
        token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        backbone_streams(model, Batch(token_11, token_11 + 1, token_11))


def finish_cache(folder: Path, identity: StreamIdentity, num_shards: int, fidelity: Fidelity | None) -> None:
    """Write the manifest once all shards exist."""
    shards = written_shards(folder, num_shards)
    assert len(shards) == num_shards
    content = StreamContent(**total_counts(shards), fidelity=fidelity)
    finish(STREAM_CACHE, folder, identity, shards, content)


def check_engine(session: Session) -> int:
    """Return the number of GPUs that vLLM uses; 0 if transformers runs the backbone.

    Raises:
        UserError: vLLM cannot run here.
    """
    collect = session.config.collect
    if collect.engine is CollectEngine.transformers or collect.plan_only:
        return 0
    rule = "runs in one process and starts those of vLLM itself; start it without a launcher"
    require(world_size() == 1, "collect.engine", collect.engine.value, rule)
    return check_vllm(collect, session.source.config, session.piece_length)


def run(session: Session) -> None:
    """Plan the shards, check the disk, write the shards and then the manifest."""
    config, run_folder = session.config, session.folder
    vllm_gpus = check_engine(session)
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
    if is_old:
        check_begun(session, corpus)
    identity = describe_streams(session, corpus, session.fingerprint)

    def open_collector() -> Collector:
        if vllm_gpus:
            return vllm_collector(session, corpus, shards, vllm_gpus)
        return transformers_collector(session, corpus, shards)

    with torch.inference_mode():
        collector = begin_cache(session, identity, is_old, open_collector)
        run_folder.record()
        collect_shards(session, shards, collector)

    on_rank0(lambda: finish_cache(run_folder.path, identity, len(shards), collector.fidelity))
    run_folder.print_status(f"wrote {run_folder.path}; train from it with data=streams data.path={run_folder.path}")
