"""A small stream cache that grows shard by shard, and trainings that follow it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mtptrain.batch import Batch
from mtptrain.config import DataConfig, DataSource, StreamFormat
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.hidden_cache.consumed import written_shards
from mtptrain.hidden_cache.followed_batches import FollowedBatches, RowSettings
from mtptrain.hidden_cache.growing_cache import GrowingCache, open_streams
from mtptrain.hidden_cache.manifest import STREAM_CACHE, StreamIdentity, TextOrigin
from mtptrain.hidden_cache.writer import plan_shards, write_shard
from mtptrain.run.artifact import begin, finish, total_counts
from mtptrain.training.checkpoint import newest_checkpoint
from mtptrain.training.data_parallel import ReplicatedEngine
from mtptrain.training.trainer import Trainer
from tests.training.toy import (
    CONFIG,
    IDENTITY,
    ToyModel,
    ToyObjective,
    V,
)

S, N, D = 8, 2, 4  # tokens a row, streams, channels
SIZES = np.random.default_rng(0).integers(2, 14, 40)  # of the documents
CORPUS = TokenizedCorpus(
    np.random.default_rng(1).integers(0, V, SIZES.sum()).astype(np.int32), np.cumsum([0, *SIZES]), 0
)
SHARDS = plan_shards(CORPUS, S, 30)
IDENTITY_OF_CACHE = StreamIdentity(
    backbone="ab",
    stream="last layer",
    layer=4,
    num_streams=N,
    width=D,
    stored_as=StreamFormat.fp32,
    dtype="float32",
    tokenizer="cd",
    chat_template=None,
    text=CORPUS.digest(),
    sequence_length=S,
    shard_tokens=30,
    data=TextOrigin.of(DataConfig()),
)


class Writer:
    """Writes the cache as `+recipe=collect` does: shard by shard, then the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        begin(STREAM_CACHE, "output_dir", self.folder, IDENTITY_OF_CACHE, making=None)

    def write(self, *numbers: int) -> None:
        for number in numbers:
            tokens = sum(size for pieces in SHARDS[number] for _, size in pieces)
            generator = torch.Generator().manual_seed(number)
            streams_TND = torch.randn(tokens, N, D, generator=generator)
            write_shard(self.folder, number, SHARDS[number], CORPUS, streams_TND, StreamFormat.fp32)

    def finish(self) -> None:
        shards = written_shards(self.folder, len(SHARDS))
        assert len(shards) == len(SHARDS)
        finish(STREAM_CACHE, self.folder, IDENTITY_OF_CACHE, shards, total_counts(shards))


def follow(folder: Path, size: int = 2, deletes: bool = False, minutes: int = 0, run: str = "run") -> FollowedBatches:
    cache = open_streams(DataConfig(source=DataSource.streams, path=str(folder), follow=True), minutes)
    return FollowedBatches(GrowingCache(cache, run, deletes), RowSettings(S, size, 0), torch.float32, minutes)


def read(batches: FollowedBatches, count: int) -> list[Batch]:
    found = []
    for index in range(batches.index, batches.index + count):
        assert batches.await_batches(index + 1, lambda: False)
        found.append(batches.batch(index))
    return found


def same(left: Batch, right: Batch) -> bool:
    names = ("tokens_BS", "segment_BS", "position_BS", "loss_mask_BS", "streams_BSND")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def rows_of_epoch(folder: Path) -> int:
    batches = follow(folder, 1)
    batches.await_batches(10_000, lambda: False)
    return batches.firsts[-1]


def shards_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard_*.safetensors"))


def trainer(folder: Path, batches: FollowedBatches, every: int = 3, steps: int = 9) -> Trainer:
    """Return a trainer of the toy model, restored from its newest checkpoint if it has one."""
    config = replace(CONFIG, steps=steps, checkpoint_every=every)
    torch.manual_seed(0)
    model = ToyModel(0.1)
    engine = ReplicatedEngine(model, config)
    made = Trainer(engine, ToyObjective(model, frozenset()), batches, config, folder / "checkpoints", IDENTITY)
    checkpoint = newest_checkpoint(made.checkpoints)
    if checkpoint is not None:
        made.restore(checkpoint)
    return made
