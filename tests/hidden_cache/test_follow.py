"""`data.follow=true`: training from a stream cache that is still being written."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtptrain.batch import Batch
from mtptrain.config import DataConfig, DataSource
from mtptrain.errors import Preempted, UserError
from mtptrain.hidden_cache.consumed import read_consumed, written_shards
from mtptrain.hidden_cache.followed_batches import FollowedBatches, RowSettings
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.growing_cache import GrowingCache, Sight, open_streams
from mtptrain.hidden_cache.manifest import open_cache
from mtptrain.hidden_cache.reader import HiddenStateBatches
from mtptrain.training.checkpoint import checkpoint_folders, newest_checkpoint
from mtptrain.training.trainer import Trainer
from tests.hidden_cache.growing import SHARDS, S, Writer, follow, read, rows_of_epoch, same, shards_on_disk, trainer
from tests.training.toy import (
    MemoryLog,
    equal_states,
    state,
)


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


def test_a_manifest_that_comes_after_the_cache_was_opened_brings_its_shards(writer: Writer) -> None:
    cache = open_streams(DataConfig(source=DataSource.streams, path=str(writer.folder), follow=True), 0)
    writer.write(*range(len(SHARDS)))
    writer.finish()
    growing = GrowingCache(cache, "run", deletes=False)
    assert [growing.look(number) for number in (0, len(SHARDS))] == [Sight.there, Sight.none_left]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"follow": True}, "data.follow=true: waits for the shards of a stream cache"),
        (
            {"source": DataSource.streams, "path": "x", "delete_consumed": True},
            "data.delete_consumed=true: .*follow=true",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        DataConfig(**settings)
