"""`data.follow=true`: training from a stream cache that is still being written, and deleting its shards after use."""

import gc
import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtptrain.batch import Batch
from mtptrain.config import DataConfig, DataSource, StreamFormat
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.errors import Preempted, UserError
from mtptrain.hidden_cache import followed
from mtptrain.hidden_cache.consumed import CONSUMED, read_consumed, written_shards
from mtptrain.hidden_cache.followed import FollowedCache, open_streams
from mtptrain.hidden_cache.follower import FollowedBatches, RowSettings
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.manifest import STREAM_CACHE, StreamIdentity, TextOrigin, open_cache
from mtptrain.hidden_cache.reader import HiddenStateBatches
from mtptrain.hidden_cache.writer import plan_shards, write_shard
from mtptrain.run.artifact import begin, finish, total_counts
from mtptrain.training.checkpoint import checkpoint_folders, newest_checkpoint
from mtptrain.training.data_parallel import ReplicatedEngine
from mtptrain.training.trainer import Trainer
from tests.training.test_trainer import (
    CONFIG,
    IDENTITY,
    MemoryLog,
    ToyModel,
    ToyObjective,
    V,
    equal_states,
    state,
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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "POLL_SECONDS", 0.001)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """A begun cache without shards."""
    writer = Writer(tmp_path / "cache")
    writer.begin()
    return writer


@pytest.fixture
def whole(writer: Writer) -> Path:
    """A complete cache."""
    writer.write(*range(len(SHARDS)))
    writer.finish()
    return writer.folder


def follow(folder: Path, size: int = 2, deletes: bool = False, minutes: int = 0, run: str = "run") -> FollowedBatches:
    cache = open_streams(DataConfig(source=DataSource.streams, path=str(folder), follow=True), minutes)
    return FollowedBatches(FollowedCache(cache, run, deletes), RowSettings(S, size, 0), torch.float32, minutes)


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


def tokens_with_streams(batches: list[Batch]) -> Counter[Any]:
    """Count the tokens, each with its streams."""
    found: Counter[Any] = Counter()
    for batch in batches:
        assert batch.streams_BSND is not None
        inside_BS = batch.segment_BS > 0
        tokens, streams = batch.tokens_BS[inside_BS], batch.streams_BSND[inside_BS]
        found.update((int(token), tuple(one.flatten().tolist())) for token, one in zip(tokens, streams, strict=True))
    return found


def test_following_gives_the_batches_of_the_finished_cache(writer: Writer, tmp_path: Path) -> None:
    finished = Writer(tmp_path / "other")
    finished.begin()
    finished.write(*range(len(SHARDS)))
    finished.finish()
    growing = follow(writer.folder, 3, minutes=5)

    def collect() -> None:
        for number in (1, 0, *range(2, len(SHARDS))):  # processes take turns and are not equally fast
            writer.write(number)
        writer.finish()

    thread = threading.Thread(target=collect)
    thread.start()
    count = 2 * rows_of_epoch(finished.folder) // 3 + 2  # into the third epoch
    left, right = read(growing, count), read(follow(finished.folder, 3), count)
    thread.join()
    assert all(map(same, left, right))


def test_the_first_epoch_holds_every_row_once_in_the_order_of_shards(whole: Path) -> None:
    total = rows_of_epoch(whole)
    followed_rows = read(follow(whole, 1), 2 * total)
    first, second = followed_rows[:total], followed_rows[total:]
    shuffled = HiddenStateBatches(open_cache(whole), S, 1, 0, torch.float32)
    expected = tokens_with_streams([shuffled.batch(index) for index in range(len(shuffled.order.rows))])
    assert tokens_with_streams(first) == tokens_with_streams(second) == expected
    assert not all(map(same, first, second))
    sizes = [sum(size for pieces in documents for _, size in pieces) for documents in SHARDS]
    begun = 0
    for size, limit in zip(sizes, np.cumsum(sizes), strict=True):
        seen = sum(int((row.segment_BS > 0).sum()) for row in first[:begun])
        while seen < limit:
            seen += int((first[begun].segment_BS > 0).sum())
            begun += 1
        assert seen == limit, size  # no row mixes shards


def test_a_position_continues_in_any_epoch_and_with_another_batch_size(whole: Path) -> None:
    total = rows_of_epoch(whole)
    rows = read(follow(whole, 1), 2 * total + 6)
    for done in (0, 3, total // 2, total // 2 + 3):
        batches = follow(whole, 2)
        read(batches, done)
        position = json.loads(json.dumps(batches.position()))
        resumed = follow(whole, 3)
        resumed.seek(done, [position])
        for number, batch in enumerate(read(resumed, 2)):
            expected = rows[2 * done + 3 * number : 2 * done + 3 * number + 3]
            assert torch.equal(batch.tokens_BS, torch.cat([one.tokens_BS for one in expected]))


def test_rows_of_another_length_do_not_continue(whole: Path) -> None:
    batches = follow(whole)
    read(batches, 1)
    other = FollowedBatches(batches.source, RowSettings(S + 1, 2, 0), torch.float32, 0)
    with pytest.raises(UserError, match=r"data\.sequence_length=9: .* rows of 8 tokens; set it back"):
        other.seek(1, [batches.position()])


def test_a_shard_that_does_not_come_ends_the_wait(writer: Writer) -> None:
    writer.write(0, 2)
    batches = follow(writer.folder, 1)
    with pytest.raises(UserError, match=r"distributed_timeout=0: shard_00001.safetensors did not appear in .*resume"):
        read(batches, 100)
    assert batches.index == batches.firsts[-1] > 0  # all that was there is used
    writer.write(1)
    read(batches, 1)


def test_a_cache_that_is_not_begun_ends_the_wait(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distributed_timeout=0: no stream cache was begun in"):
        follow(tmp_path / "none")


@pytest.mark.parametrize("damage", ["truncated", "gone", "altered"])
def test_a_damaged_shard_is_named(damage: str, writer: Writer) -> None:
    writer.write(0, 1)
    path = writer.folder / shard_file(1)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "altered" else b""))
    with pytest.raises(UserError, match=r"shard_00001.safetensors is missing, truncated or altered"):
        read(follow(writer.folder, 1), 100)


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


@pytest.fixture
def uninterrupted(whole: Path, tmp_path: Path) -> Trainer:
    """A training of nine steps on the finished cache."""
    made = trainer(tmp_path / "uninterrupted", follow(whole))
    made.run(MemoryLog())
    return made


def test_collections_and_trainings_that_end_early_continue_to_the_same_bits(
    uninterrupted: Trainer, tmp_path: Path
) -> None:
    """The collection dies twice; the training saves its last step, although no checkpoint is due, and goes on."""
    writer, run = Writer(tmp_path / "growing"), tmp_path / "run"
    writer.begin()
    writer.write(0)
    for number, deletes in ((1, True), (2, False), (3, True)):
        with pytest.raises(UserError, match=f"shard_0000{number}.safetensors did not appear"):
            trainer(run, follow(writer.folder, deletes=deletes), every=100).run(MemoryLog())
        last = newest_checkpoint(run / "checkpoints")
        assert last is not None
        assert 0 < last.step < 9
        kept = shards_on_disk(writer.folder)
        assert (shard_file(0) in kept) == (number == 1 and last.counters["data_positions"][0]["shard"] == 0)
        assert set(written_shards(writer.folder, len(SHARDS))) == {shard_file(one) for one in range(number)}
        writer.write(number)
    writer.write(*range(4, len(SHARDS)))
    writer.finish()
    made = trainer(run, follow(writer.folder, deletes=True))
    made.run(MemoryLog())
    assert equal_states(state(made), state(uninterrupted))
    consumed = read_consumed(writer.folder)
    assert consumed is not None
    assert shards_on_disk(writer.folder) == [shard_file(one) for one in range(consumed.shards, len(SHARDS))]
    assert list(open_cache(writer.folder).files) == [shard_file(one) for one in range(len(SHARDS))]


def test_deletion_keeps_the_shards_that_a_resume_from_the_newest_checkpoint_reads(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = trainer(run, follow(whole, deletes=True), every=2)
    for _ in range(5):
        made._await_batches()
        made.train_step()
        if made.step == 2:
            made.save()
            after_two = shards_on_disk(whole)
    assert shards_on_disk(whole) == after_two  # steps that are not saved delete nothing
    made.save("best")  # nobody resumes from it
    assert shards_on_disk(whole) == after_two
    resumed = trainer(run, follow(whole, deletes=True), every=2)
    assert resumed.step == 2
    for _ in range(3):
        resumed._await_batches()
        resumed.train_step()
    assert equal_states(state(resumed), state(made))
    resumed.save()
    kept = shards_on_disk(whole)
    assert len(kept) < len(after_two)
    del made  # its batches were not told
    gc.collect()
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")  # the space of a mapped file is not freed
    assert [name for name in after_two if f"{whole}/{name}" in mapped and name not in kept] == []


def test_an_older_checkpoint_whose_shards_are_deleted_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(run, follow(whole, deletes=True), every=1).run(MemoryLog())
    for folder in checkpoint_folders(run / "checkpoints")[1:]:
        (folder / "module.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard_0000\d.safetensors was deleted after use \(data.delete_consumed\)"):
        trainer(run, follow(whole))
    with pytest.raises(UserError, match=r"shard_00000\.safetensors was deleted after use"):
        trainer(tmp_path / "again", follow(whole)).run(MemoryLog())


def test_a_second_run_is_refused(whole: Path) -> None:
    follow(whole, deletes=True)
    for deletes in (True, False):
        with pytest.raises(UserError, match=r"the run in run deletes its shards after use .* has deleted 0"):
            follow(whole, deletes=deletes, run="other")


def test_an_interrupted_deletion_is_completed(whole: Path) -> None:
    (whole / CONSUMED).write_text('{"by": "run", "shards": 2}', encoding="utf-8")
    assert shard_file(1) in shards_on_disk(whole)
    follow(whole, deletes=True)
    assert shards_on_disk(whole) == [shard_file(one) for one in range(2, len(SHARDS))]
    assert len(written_shards(whole, len(SHARDS))) == len(SHARDS)


def test_there_is_no_second_epoch_of_deleted_shards(whole: Path, tmp_path: Path) -> None:
    steps = rows_of_epoch(whole) // 2
    with pytest.raises(UserError, match=r"data.delete_consumed=True: all \d+ rows .* give its number as train.steps"):
        trainer(tmp_path, follow(whole, deletes=True), every=100, steps=100).run(MemoryLog())
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == [f"step_{steps:08d}"]
    ended = trainer(tmp_path, follow(whole, deletes=True), steps=steps)
    ended.run(MemoryLog())
    assert ended.step == steps


def test_a_signal_ends_a_wait_and_saves(writer: Writer, tmp_path: Path) -> None:
    writer.write(0)
    made = trainer(tmp_path / "run", follow(writer.folder, minutes=5), every=100)
    made._await_batches()
    made.train_step()
    made.train_step()
    made.stop_request.is_made = True
    with pytest.raises(Preempted, match=f"step {made.step} of 9 is saved"):
        made._await_batches()
    assert [path.name for path in checkpoint_folders(made.checkpoints)] == [f"step_{made.step:08d}"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"follow": True}, "data.follow=True: waits for the shards of a stream cache"),
        (
            {"source": DataSource.streams, "path": "x", "delete_consumed": True},
            "data.delete_consumed=True: .*follow=true",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        DataConfig(**settings)
