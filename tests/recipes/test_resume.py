"""An interrupted run continues as if nothing had happened; a different run does not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtptrain.run.folder_lock import lock_path
from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import hold_folder, kill_when, read_metrics, run_main, start_process, tree
from tests.conftest import save_backbone
from tests.recipes.test_recipes import SHAPE

STEPS = 24


def test_a_killed_run_continues_to_the_same_bits(light: list[str], tmp_path: Path) -> None:
    arguments = [
        "+recipe=distill",
        *light,
        f"train.steps={STEPS}",
        "train.log_every=2",
        "train.checkpoint_every=3",
        "evaluate_at_end=false",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_when(
        start_process(*arguments, f"output_dir={killed}", folder=tmp_path),
        lambda: checkpoint_folders(killed / "checkpoints"),
    )
    assert not (killed / "checkpoints" / f"step_{STEPS:08d}").exists()  # it ended early

    assert run_main(*arguments, f"output_dir={killed}", "resume=auto") == 0
    assert run_main(*arguments, f"output_dir={whole}") == 0
    left, right = (
        load_file(checkpoint_folders(run / "checkpoints")[-1] / "module.safetensors") for run in (killed, whole)
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [row["step"] for row in read_metrics(killed)] == list(range(2, STEPS + 1, 2))
    assert read_metrics(killed)[-1]["tokens"] == read_metrics(whole)[-1]["tokens"]
    assert not [*killed.rglob("*.tmp"), *killed.rglob("*.lock")]
    assert "continues" in json.loads((killed / "provenance.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished distill run; do not write into it."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_main("+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def other_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that differs from the shared one in its config."""
    folder = tmp_path_factory.mktemp("other_backbone")
    save_backbone(folder, index_topk=2)
    return folder


@pytest.mark.parametrize(
    ("recipe", "arguments", "reason"),
    [
        (
            "pretrain",
            ["resume=auto"],
            "belongs to another run: +recipe distill -> pretrain, loss.divergence kl -> ce,",
        ),
        (
            "distill",
            ["resume=auto", "mtp.mode=stacked", "evaluation.every=1"],
            "belongs to another run: mtp.mode shared -> stacked; set them back, or choose another",
        ),
        ("distill", ["resume=auto", "backbone.path=OTHER"], "another run: backbone.path (fingerprint) "),
        (
            "distill",
            ["resume=auto", "data.path=EMPTIER", "loss.divergence=tv", "seed=5", "train.learning_rate=1e-2"],
            "seed 0 -> 5, data.path WHOLE -> EMPTIER, loss.divergence kl -> tv, train.learning_rate 0.004 -> 0.01; ",
        ),
        ("distill", ["resume=auto", "data.sequence_length=31"], "data.sequence_length 32 -> 31; set them back, choose"),
        ("distill", [], "already holds a run; choose another folder, or continue it with resume=auto"),
        ("collect", ["resume=auto"], "holds other files than a stream cache; choose"),
        ("export", ["target=hf", "checkpoint=RUN"], "is not empty; choose another folder, nothing is overwritten"),
        ("evaluate", ["checkpoint=stock", "overwrite=true"], "already holds a training run; choose another folder"),
    ],
    ids=["task", "mode", "backbone", "several", "rows", "no_resume", "collect", "export", "evaluate"],
)
def test_another_run_leaves_the_folder_as_it_is(
    recipe: str,
    arguments: list[str],
    reason: str,
    finished: Path,
    other_backbone: Path,
    corpus_file: Path,
    light: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = tree(finished)
    emptier = tmp_path / "emptier.jsonl"
    emptier.write_text("".join(corpus_file.read_text(encoding="utf-8").splitlines(keepends=True)[:30]))
    places = {"OTHER": other_backbone, "EMPTIER": emptier, "WHOLE": corpus_file, "RUN": finished}
    for place, path in places.items():
        arguments = [argument.replace(place, str(path)) for argument in arguments]
        reason = reason.replace(place, str(path))
    assert run_main(f"+recipe={recipe}", *light, f"output_dir={finished}", *arguments) == 2
    *lines, message = capfd.readouterr().err.splitlines()
    assert message.startswith("mtptrain: ")
    assert reason in message
    assert not any("frozen" in line for line in lines)  # found before the backbone is loaded
    assert str(finished) in message
    assert re.search("choose (another|an empty)", message)
    assert tree(finished) == before


@pytest.mark.parametrize("recipe", ["distill", "export", "collect", "mini_release"])
def test_a_folder_that_another_run_writes_is_left_to_it(
    recipe: str, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, is_beside = tmp_path / "run", recipe in ("export", "mini_release")
    process = hold_folder(folder, is_beside)
    try:
        more = ["target=hf", "checkpoint=absent"] if recipe == "export" else [] if is_beside else ["resume=auto"]
        assert run_main(f"+recipe={recipe}", *light, *more, f"output_dir={folder}") == 2
        message = capfd.readouterr().err.splitlines()[-1]
        assert message.startswith(f"mtptrain: output_dir={folder}: process {process.pid} on ")
        path = lock_path(folder, is_beside)
        assert message.endswith(f"If it is gone, delete {path}")
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [path]
    finally:
        process.communicate()


def test_a_stack_of_another_depth_is_not_continued(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["+recipe=distill", *light, "mtp.mode=stacked", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*arguments) == 0
    before = tree(tmp_path)
    assert run_main(*arguments, "resume=auto", "mtp.depth=2") == 2
    assert re.search(r"another run: mtp\.depth 1 -> 2; set .*mtp\.depth cannot change", capfd.readouterr().err)
    assert tree(tmp_path) == before


def test_the_same_data_under_another_path_are_the_same_run(
    finished: Path, light: list[str], corpus_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / corpus_file.name
    moved.write_bytes(corpus_file.read_bytes())
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={run}"]
    assert run_main(*arguments, "resume=auto", f"data.path={moved}") == 0
    moved.write_bytes(b"".join(moved.read_bytes().splitlines(keepends=True)[:40]))
    assert run_main(*arguments, "resume=auto", f"data.path={moved}") == 2
    assert f"data.path {corpus_file} -> {moved}" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_change_that_is_allowed_by_name_is_said_and_trained(
    streaming: bool,
    finished: Path,
    light: list[str],
    corpus_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(corpus_file.read_text(encoding="utf-8").splitlines(keepends=True)[:40]))
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path / 'run'}"]
    if streaming:
        arguments += ["data.streaming=true", "data.workers=0"]
        assert run_main(*arguments) == 0
    else:
        shutil.copytree(finished, tmp_path / "run")
    arguments += ["resume=auto", "resume_allow=[data.path,train]", "train.steps=4"]
    assert run_main(*arguments, f"data.path={other}") == 0
    lines = capfd.readouterr().err
    assert f"changed as resume_allow permits: data.path {corpus_file} -> {other}, train.steps 2 -> 4\n" in lines
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_more_steps_for_a_finished_run_are_a_choice_that_names_the_learning_rate(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["+recipe=distill", *light, "train.warmup_steps=0", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*arguments) == 0
    more = [*arguments, "resume=auto", "train.steps=4"]
    assert run_main(*more) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.endswith(
        "train.steps 2 -> 4; set them back, choose another output_dir, or accept the change: resume_allow=[train.steps]"
    )
    assert run_main(*more, "resume_allow=[train.steps]") == 0
    # 4e-3 times 1, 1/2 of the old cosine; (1 + cos(pi/2)) / 2, (1 + cos(3 pi/4)) / 2 of the new one
    said = (
        "learning rate: 0.002 at step 2; under the new schedule it goes on to 0.002 at step 3 and ends at 0.000586 at"
    )
    assert said in capfd.readouterr().err
    rates = [row["learning_rate"] for row in read_metrics(tmp_path)]
    assert rates == pytest.approx([4e-3, 2e-3, 2e-3, 0.000585786], rel=1e-4)


def test_a_backbone_and_its_stock_head_are_continued_with_their_own_settings(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = [one for one in light if not one.startswith("backbone.path=")]
    arguments = ["+recipe=backbone", *kept, *SHAPE, "stock_head.steps=2", "stock_head.batch_size=2"]
    arguments += [f"output_dir={tmp_path}"]
    assert run_main(*arguments) == 0
    arguments += ["resume=auto"]
    assert run_main(*arguments) == 0
    assert "step 2 of 2 is done: nothing is left to train" in capfd.readouterr().err
    for change, difference in {
        "train.weight_decay=0.2": "train.weight_decay 0.1 -> 0.2",
        "stock_head.learning_rate=0.5": "stock_head.learning_rate 0.002 -> 0.5",
        "backbone.shape.index_topk=3": "backbone.shape.index_topk 16 -> 3; set them back, or choose another output_dir",
    }.items():
        assert run_main(*arguments, change) == 2
        assert difference in capfd.readouterr().err.splitlines()[-1]


def test_a_resume_without_a_checkpoint_says_that_it_starts(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}", "resume=auto"]
    assert run_main(*arguments) == 0
    root = tmp_path / "checkpoints"
    said = f"resume=auto: {root} holds no checkpoint to continue; starting at step 0"
    assert capfd.readouterr().err.splitlines().count(said) == 1
    assert run_main(*arguments) == 0
    assert "step 2 of 2 is done: nothing is left to train" in capfd.readouterr().err.splitlines()


def test_a_finished_run_is_not_trained_again(finished: Path, light: list[str], tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={run}"]
    assert run_main(*arguments, "resume=auto") == 0
    assert tree(run / "checkpoints") == tree(finished / "checkpoints")
    assert read_metrics(run) == read_metrics(finished)


def test_a_damaged_newest_checkpoint_is_passed_over(
    finished: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={run}"]
    newest = run / "checkpoints" / "step_00000002" / "module.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    assert run_main(*arguments, "resume=auto") == 0
    errors = capfd.readouterr().err
    assert "skipping a damaged checkpoint" in errors
    assert "continuing from step 1" in errors
    assert newest.read_bytes() == whole
