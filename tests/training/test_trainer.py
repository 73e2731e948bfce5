from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtptrain.config import OptimizerName
from mtptrain.errors import UserError
from mtptrain.training.checkpoint import (
    BEST,
    checkpoint_folders,
    checkpoint_name,
    newest_checkpoint,
    open_checkpoint,
)
from mtptrain.training.trainer import MetricTotals, Probe, Step, Trainer
from tests.training.toy import (
    CONFIG,
    IDENTITY,
    MemoryLog,
    ToyObjective,
    equal_states,
    optimizer_of,
    state,
    toy_trainer,
)


@pytest.mark.parametrize("optimizer", OptimizerName)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_at_any_step_ends_with_the_same_bits(
    dtype: torch.dtype, optimizer: OptimizerName, tmp_path: Path
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole = toy_trainer(tmp_path, config, dtype=dtype)
    whole.run(MemoryLog())
    for step in range(1, CONFIG.steps):
        resumed = toy_trainer(tmp_path / f"from_{step}", config, dtype=dtype)
        torch.manual_seed(1234)  # the random state before a resume does not matter
        resumed.restore(open_checkpoint(whole.checkpoints / checkpoint_name(step)))
        assert resumed.step == step
        resumed.run(MemoryLog())
        assert equal_states(state(resumed), state(whole))
        assert resumed.counters == whole.counters


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    log = MemoryLog()
    toy_trainer(tmp_path, replace(CONFIG, steps=60)).run(log)
    assert log.rows[-1]["loss/step_1"] < log.rows[0]["loss/step_1"]


def test_the_last_step_writes_a_checkpoint_whatever_the_interval(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, replace(CONFIG, checkpoint_every=4))
    trainer.run(MemoryLog())
    assert [folder.name for folder in checkpoint_folders(trainer.checkpoints)] == [
        checkpoint_name(step) for step in (4, 8, 9)
    ]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, replace(CONFIG, keep_checkpoints=2))
    trainer.run(MemoryLog())
    newest = newest_checkpoint(trainer.checkpoints)
    assert newest is not None
    assert newest.step == 9
    assert len(checkpoint_folders(trainer.checkpoints)) == 2


def test_a_run_that_is_done_trains_no_further(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.run(MemoryLog())
    done = state(trainer)
    log = MemoryLog()
    trainer.run(log)
    assert log.rows == []
    assert equal_states(state(trainer), done)


def moment(trainer: Trainer) -> Tensor:
    """A copy of AdamW's first moment of a weight."""
    (values,) = (one.values for one in trainer.engine.state().optimizer if one.name == "head.weight/exp_avg")
    return values.clone()


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, bad_batches=frozenset([1]))
    trainer.train_step()
    before, moment_before = state(trainer), moment(trainer)
    assert trainer.train_step().sums_K == {}
    assert equal_states(state(trainer), before)
    assert torch.equal(moment(trainer), moment_before)
    assert trainer.step == 2
    assert (trainer.counters["skipped_steps"], trainer.counters["bad_steps_in_a_row"]) == (1, 1)


def test_a_finite_step_ends_the_row_of_bad_ones_and_trains_on(tmp_path: Path) -> None:
    log = MemoryLog()
    trainer = toy_trainer(tmp_path, replace(CONFIG, max_bad_steps=2), bad_batches=frozenset([1, 3, 5, 7]))
    trainer.run(log)
    assert (trainer.counters["skipped_steps"], trainer.counters["bad_steps_in_a_row"]) == (4, 0)
    assert all(torch.isfinite(value).all() for value in state(trainer).values())
    assert all(row["loss/step_1"] == row["loss/step_1"] for row in log.rows)  # no NaN in a mean


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, replace(CONFIG, max_bad_steps=3), bad_batches=frozenset(range(4, 99)))
    with pytest.raises(UserError, match=r"train\.max_bad_steps=3: .*lower train\.learning_rate \(now 0\.05\)"):
        trainer.run(MemoryLog())
    assert trainer.counters["skipped_steps"] == 3
    assert all(torch.isfinite(value).all() for value in state(trainer).values())


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    config, bad = replace(CONFIG, max_bad_steps=3), frozenset(range(4, 99))
    with pytest.raises(UserError):
        toy_trainer(tmp_path, config, bad).run(MemoryLog())
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    resumed = toy_trainer(tmp_path, config, bad)
    resumed.restore(newest)
    assert resumed.counters["bad_steps_in_a_row"] == 2
    with pytest.raises(UserError):
        resumed.train_step()


def test_micro_batches_together_give_the_gradient_of_one_big_batch(tmp_path: Path) -> None:
    # Gradients, not parameters: AdamW's first step depends on little more than their signs.
    gradients = []
    for batch_size, accumulation in [(6, 1), (3, 2), (1, 6)]:
        config = replace(CONFIG, batch_size=batch_size, accumulation=accumulation)
        trainer = toy_trainer(tmp_path, config, dropout=0.0)
        captured: list[Tensor] = []
        optimizer_of(trainer).register_step_pre_hook(
            lambda optimizer, *_, captured=captured: captured.extend(
                p.grad.clone() for group in optimizer.param_groups for p in group["params"]
            )
        )
        trainer.train_step()
        gradients.append(captured)
    for other in gradients[1:]:
        for left, right in zip(gradients[0], other, strict=True):
            # fp32 sums of at most 36 terms below 1 in another order: 36 * 2^-24
            torch.testing.assert_close(left, right, rtol=0, atol=36 * 2**-24)


def test_the_gradient_is_clipped_to_its_global_norm(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, replace(CONFIG, clip_norm=1e-3))
    norms: list[float] = []
    optimizer_of(trainer).register_step_pre_hook(
        lambda optimizer, *_: norms.append(
            torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm().item()
        )
    )
    assert trainer.train_step().norm > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_a_mean_is_the_sum_over_all_steps_divided_by_the_count_once() -> None:
    totals = MetricTotals()
    for counts_K, sums_K in [([3, 1], [6.0, 8.0]), ([1, 0], [10.0, 0.0])]:
        totals.add(Step(torch.tensor(counts_K).double(), {"loss": torch.tensor(sums_K).double()}, 1.0, False))
    assert totals.means() == {"loss/step_1": 16 / 4, "loss/step_2": 8.0}


def test_logged_means_cover_every_step_since_the_last_row(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, learning_rate=1e-30, accumulation=2)  # too small to change the model
    trainer, log = toy_trainer(tmp_path, config, dropout=0.0), MemoryLog()
    objective, total, count = ToyObjective(trainer.engine.module), 0.0, 0.0
    for index in range(6):
        batch = trainer.batches.batch(index)
        total += objective(batch, torch.ones(1)).sums_K["loss"].item()
        count += objective.counts(batch).item()
    trainer.run(log)
    assert [row["step"] for row in log.rows] == [3]
    assert log.rows[0]["loss/step_1"] == pytest.approx(total / count, rel=1e-6)


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.train_step()
    assert trainer.counters["tokens"] == int((trainer.batches.batch(0).segment_BS > 0).sum())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"task": "pretrain"}, r"\+recipe distill -> pretrain; .*choose another output_dir \(\+recipe cannot change"),
        ({"backbone": "0" * 64}, r"backbone\.path \(fingerprint\) abababababab -> 000000000000; "),
        ({"settings": {**IDENTITY.settings, "mtp.mode": "stacked"}}, r"mtp\.mode shared -> stacked; "),
        (
            {"settings": {**IDENTITY.settings, "train.learning_rate": 0.5}, "data": "0" * 64},
            r"train\.learning_rate 0\.05 -> 0\.5, data .* efefefefefef -> 000000000000; .*"
            r"resume_allow=\[train\.learning_rate,data\]",
        ),
    ],
    ids=["task", "backbone", "mode", "rate_and_data"],
)
def test_a_checkpoint_of_another_training_is_refused(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.train_step()
    checkpoint = open_checkpoint(trainer.save())
    other = toy_trainer(tmp_path)
    other.identity = replace(IDENTITY, **change)
    before = state(other)
    with pytest.raises(UserError, match=rf"^resume=auto: {checkpoint.folder}: belongs to another run: {line}"):
        other.restore(checkpoint)
    assert equal_states(state(other), before)


def test_a_difference_that_is_allowed_by_name_is_returned(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.train_step()
    checkpoint = open_checkpoint(trainer.save())
    other = toy_trainer(tmp_path)
    other.identity = replace(IDENTITY, settings={**IDENTITY.settings, "train.learning_rate": 0.5})
    assert list(map(str, other.restore(checkpoint, ["train"]))) == ["train.learning_rate 0.05 -> 0.5"]
    assert other.step == 1


def test_the_checkpoint_with_the_best_score_is_kept(tmp_path: Path) -> None:
    """Scores 1, 3, 2 at steps 3, 6, 9: `best` is the checkpoint of step 6."""
    scores = iter([1.0, 3.0, 2.0])
    trainer = toy_trainer(tmp_path)
    trainer.probe = Probe(3, lambda: {"score": next(scores)}, "score", ["a", "b"])
    rows = MemoryLog()
    trainer.run(rows)
    best = open_checkpoint(tmp_path / "checkpoints" / BEST)
    assert (best.step, best.counters["best_score"]) == (6, 3.0)
    selection = best.selection()
    assert selection is not None
    assert (selection.by, selection.prompts) == ("score", ["a", "b"])
    assert [row["score"] for row in rows.rows if "score" in row] == [1.0, 3.0, 2.0]


def test_scores_of_different_metrics_are_not_compared_across_a_resume(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    trainer.probe = Probe(3, lambda: {"score": 9.0}, "score")
    trainer.run(MemoryLog())
    other = toy_trainer(tmp_path)
    other.restore(open_checkpoint(tmp_path / "checkpoints" / "step_00000006"))
    other.probe = Probe(3, lambda: {"other": 1.0}, "other")
    other.run(MemoryLog())
    best = open_checkpoint(tmp_path / "checkpoints" / BEST)
    assert (best.step, best.counters["best_score"]) == (9, 1.0)
