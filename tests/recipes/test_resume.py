"""An interrupted run continues as if nothing had happened; a different run does not."""

import _thread
import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtptrain.run.folder_lock import lock_path
from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import hold_folder, kill_when, read_metrics, run_main, start_process, tree
from tests.conftest import save_backbone

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


def test_an_interrupted_run_says_how_to_continue(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A shell starts its background jobs, a test run among them, with Ctrl-C ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not checkpoint_folders(tmp_path / "checkpoints"):
            time.sleep(0.01)
        _thread.interrupt_main()  # what Ctrl-C does

    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}"]
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert run_main(*arguments, "train.steps=500") == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == "mtptrain: interrupted; continue with the same output_dir and resume=auto"
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.lock")]
    step = int(checkpoint_folders(tmp_path / "checkpoints")[-1].name.removeprefix("step_"))
    assert run_main(*arguments, "resume=auto", f"train.steps={step + 1}") == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, step + 2))


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
            "holds task=distill, steps=3 and this run has task=pretrain, steps=1; set +recipe, mtp.steps to match, or",
        ),
        (
            "distill",
            ["resume=auto", "mtp.mode=stacked", "evaluation.every=1"],
            "holds mode=shared and this run has mode=stacked; set mtp.mode to match, or",
        ),
        ("distill", ["resume=auto", "backbone.path=OTHER"], "holds backbone="),
        ("distill", [], "already holds a run; choose another folder, or continue it with resume=auto"),
        ("evaluate", ["checkpoint=stock"], "already holds a run"),
    ],
    ids=["task", "mode", "backbone", "no_resume", "evaluate"],
)
def test_another_run_leaves_the_folder_as_it_is(
    recipe: str,
    arguments: list[str],
    reason: str,
    finished: Path,
    other_backbone: Path,
    light: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = tree(finished)
    arguments = [argument.replace("OTHER", str(other_backbone)) for argument in arguments]
    assert run_main(f"+recipe={recipe}", *light, f"output_dir={finished}", *arguments) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("mtptrain: ")
    assert reason in message
    assert str(finished) in message
    assert "choose another" in message
    assert tree(finished) == before


@pytest.mark.parametrize("recipe", ["distill", "export", "collect", "mini_release"])
def test_a_folder_that_another_run_writes_is_left_to_it(
    recipe: str, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, is_beside = tmp_path / "run", recipe in ("export", "mini_release")
    process = hold_folder(folder, is_beside)
    try:
        more = {"export": ["target=hf", "checkpoint=absent"]}.get(recipe, [])
        assert run_main(f"+recipe={recipe}", *light, *more, f"output_dir={folder}", "resume=auto") == 2
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
    assert re.search(r"holds depth=1, .* has depth=2, .*; set mtp.depth, mtp.init to match, or", capfd.readouterr().err)
    assert tree(tmp_path) == before


def test_a_finished_run_is_not_trained_again(light: list[str], tmp_path: Path) -> None:
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*arguments) == 0
    checkpoints, rows = tree(tmp_path / "checkpoints"), read_metrics(tmp_path)
    assert run_main(*arguments, "resume=auto") == 0
    assert tree(tmp_path / "checkpoints") == checkpoints
    assert read_metrics(tmp_path) == rows


def test_a_damaged_newest_checkpoint_is_passed_over(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*arguments) == 0
    newest = tmp_path / "checkpoints" / "step_00000002" / "module.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    assert run_main(*arguments, "resume=auto") == 0
    errors = capfd.readouterr().err
    assert "skipping a damaged checkpoint" in errors
    assert "continuing from step 1" in errors
    assert newest.read_bytes() == whole
