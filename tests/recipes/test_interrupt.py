"""Ctrl-C and SIGTERM: the work is saved where it can be, and the last line says what is left and how to go on."""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtptrain.recipes import collect, distill, evaluate, export, on_policy
from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import read_metrics, run_main, tree
from tests.light import certified


@pytest.fixture(autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """A shell starts its background jobs, a test run among them, with Ctrl-C ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def signalled(function: Callable[..., Any], *signals: signal.Signals) -> Callable[..., Any]:
    """Return a function that first sends signals to this process."""

    def call(*arguments: Any, **named: Any) -> Any:
        for number in signals:
            signal.raise_signal(number)
        return function(*arguments, **named)

    return call


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_ctrl_c_saves_the_step_and_the_run_goes_on(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
            time.sleep(0.01)
        _thread.interrupt_main()  # what Ctrl-C does

    arguments = ["+recipe=distill", *light, "train.checkpoint_every=1000", "evaluate_at_end=false"]
    arguments += [f"output_dir={tmp_path}", "train.steps=500"]
    threading.Thread(target=interrupt, daemon=True).start()
    assert run_main(*arguments) == 130
    step = int(checkpoint_folders(tmp_path / "checkpoints")[-1].name.removeprefix("step_"))
    on = f"continue with resume=auto output_dir={tmp_path}"
    assert last_line(capfd) == f"mtptrain: interrupted: step {step} of 500 is saved; {on}"
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.lock")]
    arguments[-1] = f"train.steps={step + 1}"
    assert run_main(*arguments, "resume=auto", "resume_allow=[train.steps]") == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, step + 2))


def test_a_second_ctrl_c_leaves_at_once(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = signalled(distill.Trainer.train_step, signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(distill.Trainer, "train_step", step)
    assert run_main("+recipe=distill", *light, f"output_dir={tmp_path / 'run'}") == 130
    lines = capfd.readouterr().err.splitlines()
    assert "the run ends after this step, which is saved; Ctrl-C again ends it at once" in lines
    assert lines[-1] == "mtptrain: interrupted: nothing is saved yet; start it again"
    assert not checkpoint_folders(tmp_path / "run" / "checkpoints")


def test_a_run_that_is_interrupted_while_it_measures_measures_at_the_next_start(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["+recipe=distill", *light, f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "evaluate_heads", signalled(distill.evaluate_heads, signal.SIGUSR1))
        assert run_main(*arguments) == 75
    on = f"continue with resume=auto output_dir={tmp_path}"
    assert last_line(capfd) == f"mtptrain: preempted: step 2 is saved; {on}"
    with certified():
        assert run_main(*arguments, "resume=auto") == 0
    measured = (tmp_path / "evaluation.json").read_bytes()
    capfd.readouterr()
    assert run_main(*arguments, "resume=auto") == 0
    assert "measures this head already; overwrite=true measures it again" in last_line(capfd)
    assert (tmp_path / "evaluation.json").read_bytes() == measured


@pytest.mark.parametrize(
    ("recipe", "module", "name"),
    [("evaluate", evaluate, "make_certificate"), ("export", export, "write_config")],
)
def test_a_result_that_is_interrupted_is_not_there(
    recipe: str,
    module: Any,
    name: str,
    light: list[str],
    release_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [f"+recipe={recipe}", *light, f"backbone.path={release_folder}", f"output_dir={tmp_path / 'out'}"]
    if recipe == "export":
        head = tmp_path / "head"
        more = [f"backbone.path={release_folder}", "evaluate_at_end=false", f"output_dir={head}"]
        assert run_main("+recipe=distill", *light, *more) == 0
        arguments += [f"checkpoint={head}", "target=hf", "export.max_drop=1"]
    else:
        arguments += ["checkpoint=stock"]
    monkeypatch.setattr(module, name, signalled(getattr(module, name), signal.SIGTERM))
    assert run_main(*arguments) == 75
    assert last_line(capfd) == "mtptrain: preempted: nothing is saved yet; start it again"
    assert not list(tmp_path.rglob(".*"))
    monkeypatch.undo()
    assert run_main(*arguments) == 0


def test_a_collection_that_is_interrupted_keeps_whole_shards(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["+recipe=collect", *light, "collect.shard_tokens=400"]
    whole, folder = tmp_path / "whole", tmp_path / "cache"
    assert run_main(*arguments, f"output_dir={whole}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(collect, "write_shard", signalled(collect.write_shard, signal.SIGINT))
        assert run_main(*arguments, f"output_dir={folder}") == 130
    count, on = len(list(whole.glob("shard_*.safetensors"))), f"continue with resume=auto output_dir={folder}"
    assert last_line(capfd) == f"mtptrain: interrupted: 1 of {count} shards are kept; {on}"
    with monkeypatch.context() as patch:
        patch.setattr(collect, "write_shard", signalled(collect.write_shard, signal.SIGINT, signal.SIGINT))
        assert run_main(*arguments, f"output_dir={folder}", "resume=auto") == 130
    assert last_line(capfd) == f"mtptrain: interrupted: the finished parts in {folder} are kept; {on}"
    assert run_main(*arguments, f"output_dir={folder}", "resume=auto") == 0
    kept = {name: digest for name, digest in tree(folder).items() if name.startswith(("shard", "manifest"))}
    assert kept.items() <= tree(whole).items()
    assert "manifest.json" in kept


def test_texts_that_are_interrupted_are_kept_in_whole_batches(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["+recipe=distill_on_policy", *(one for one in light if one != "data=text"), "evaluate_at_end=false"]
    arguments += ["on_policy.num_prompts=4", "on_policy.prompt_tokens=8", "on_policy.max_new_tokens=6"]
    run, texts = tmp_path / "run", tmp_path / "texts"
    arguments += ["on_policy.batch_size=2", f"on_policy.path={texts}", f"output_dir={run}", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(on_policy, "write_batch", signalled(on_policy.write_batch, signal.SIGTERM))
        assert run_main(*arguments) == 75
    kept = f"1 of 2 batches of texts are kept in {texts}; continue with resume=auto output_dir={run}"
    assert last_line(capfd) == f"mtptrain: preempted: {kept}"
    first = (texts / "texts_00000.jsonl").read_bytes()
    assert run_main(*arguments) == 0
    assert (texts / "texts_00000.jsonl").read_bytes() == first
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
