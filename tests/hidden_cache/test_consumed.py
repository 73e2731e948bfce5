"""`data.delete_consumed=true`: shards are deleted after use, as far as no resume needs them."""

import gc
from pathlib import Path

import pytest

from mtptrain.errors import UserError
from mtptrain.hidden_cache.consumed import CONSUMED, written_shards
from mtptrain.hidden_cache.format import shard_file
from mtptrain.training.checkpoint import checkpoint_folders
from tests.hidden_cache.growing import (
    SHARDS,
    follow,
    rows_of_epoch,
    shards_on_disk,
    trainer,
)
from tests.training.toy import (
    MemoryLog,
    equal_states,
    state,
)


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
    with pytest.raises(UserError, match=r"data.delete_consumed=true: all \d+ rows .* give its number as train.steps"):
        trainer(tmp_path, follow(whole, deletes=True), every=100, steps=100).run(MemoryLog())
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == [f"step_{steps:08d}"]
    ended = trainer(tmp_path, follow(whole, deletes=True), steps=steps)
    ended.run(MemoryLog())
    assert ended.step == steps
