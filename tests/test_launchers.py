"""The launchers start, end and continue runs of several processes; a failure ends with one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from mtptrain.run.folder_lock import LOCK
from mtptrain.training.checkpoint import checkpoint_folders, open_checkpoint
from tests.command import ROOT, fitting, read_metrics, run_main
from tests.warm import run_in_two

SCRIPTS = ROOT / "scripts"
SHELL_SCRIPTS = sorted(path.relative_to(ROOT) for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
STEPS = 16


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    ended = subprocess.run([checker, "-x", *SHELL_SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout + ended.stderr == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would start measuring")
def test_measuring_without_a_gpu_ends_with_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [SCRIPTS / "measure_gpu.sh", tmp_path / "gpu"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "measure_gpu: DEVICE=cuda: torch sees no GPU here; DEVICE=cpu rehearses without one\n"
    ended = subprocess.run([*command, "7"], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "measure_gpu: part 7 does not exist; give numbers from 0 to 6\n")


def start(launcher: str, *arguments: str, python: Path = Path(sys.executable)) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [SCRIPTS / launcher, *fitting(arguments)],
        env={**os.environ, "PYTHON": str(python), "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts its background jobs, a test run among them, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Return exit code and stderr; no process is left behind."""
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def running(process: "subprocess.Popen[str]", argument: str) -> list[psutil.Process]:
    """Return the processes that a launcher started with an argument: `-u` is that of torchrun's own processes."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if argument in one.cmdline()]


def wait_for_checkpoint(run: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 180
    while not checkpoint_folders(run / "checkpoints"):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return open_checkpoint(run / "checkpoints" / f"step_{STEPS:08d}").tensors()


def same_heads(left: Path, right: Path) -> bool:
    a, b = trained(left), trained(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def settings(light: list[str]) -> list[str]:
    return ["+recipe=distill", *light, f"train.steps={STEPS}", "evaluate_at_end=false"]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    run = tmp_path_factory.mktemp("launchers") / "alone"
    assert run_main(*settings, f"output_dir={run}") == 0
    return run


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes, which need no launcher for it."""
    run = tmp_path_factory.mktemp("launchers") / "whole"
    ended = run_in_two("mtptrain", *fitting([*settings, f"output_dir={run}"]))
    assert ended.codes == (0, 0), ended.errors[-3000:]
    return run


def test_two_processes_train_as_one(whole: Path, alone: Path) -> None:
    two, one = read_metrics(whole), read_metrics(alone)
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, STEPS + 1))
    # Differences of fp32 rounding, carried through sixteen steps.
    assert [row["loss/step_1"] for row in two] == pytest.approx([row["loss/step_1"] for row in one], rel=1e-3)
    assert two[0]["loss/step_1"] == pytest.approx(one[0]["loss/step_1"], rel=2**-20)


def test_a_killed_node_ends_the_job_and_a_new_start_continues_it(
    whole: Path, settings: list[str], tmp_path: Path
) -> None:
    arguments = ["--local-nodes", "2", "--nproc-per-node", "1", *settings, f"output_dir={tmp_path}"]
    process = start("launch_torchrun.sh", *arguments)
    wait_for_checkpoint(tmp_path, process)
    agent = running(process, "torch.distributed.run")[1]
    for part in [agent, *agent.children(recursive=True)]:
        part.kill()
    code, errors = finish(process)
    assert code != 0
    assert re.search(r"launch_torchrun: a node failed and the job is over \(.* exit status \d+ 137; .*start it", errors)
    assert len(checkpoint_folders(tmp_path / "checkpoints")) > 0
    assert not (tmp_path / "checkpoints" / f"step_{STEPS:08d}").exists()  # it ended early

    code, errors = finish(start("launch_torchrun.sh", *arguments))
    assert code == 0, errors[-3000:]
    assert "continuing from step" in errors
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert same_heads(tmp_path, whole)


@pytest.mark.parametrize(("number", "expected", "processes"), [(signal.SIGUSR1, 75, 2), (signal.SIGINT, 130, 1)])
def test_a_preempted_run_saves_and_continues_to_the_same_bits(
    number: signal.Signals,
    expected: int,
    processes: int,
    whole: Path,
    alone: Path,
    settings: list[str],
    tmp_path: Path,
) -> None:
    """Checkpoints are due at the end only, so the signal is the reason for the one that is written.

    Before the signal, one of two processes is suspended for a second while the other waits. The launcher sends SIGUSR1
    to the processes after Ctrl-C, too, so that one process is enough then.
    """
    arguments = [*settings, "train.checkpoint_every=1000", f"output_dir={tmp_path}"]
    process = start("launch_torchrun.sh", "--nproc-per-node", str(processes), *arguments)
    deadline = time.monotonic() + 180
    while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if processes > 1:
        worker = running(process, "-u")[-1]
        worker.suspend()
        time.sleep(1)
        worker.resume()
    process.send_signal(number)
    code, errors = finish(process)
    assert code == expected, errors[-3000:]
    line = re.findall(r"^mtptrain: .*$", errors, re.MULTILINE)
    assert len(line) == 1
    assert re.match(rf"mtptrain: preempted: step \d+ of {STEPS} is saved; continue with resume=auto", line[0])
    assert not (tmp_path / LOCK).exists()
    arguments.append("resume=auto")
    if processes == 1:
        assert run_main(*arguments) == 0
    else:
        ended = run_in_two("mtptrain", *fitting(arguments))
        assert ended.codes == (0, 0), ended.errors[-3000:]
    assert same_heads(tmp_path, alone if processes == 1 else whole)


def test_a_mistake_of_all_processes_is_printed_once_and_ends_them(
    alone: Path, settings: list[str], tmp_path: Path
) -> None:
    """The folder holds the run of another recipe."""
    run = shutil.copytree(alone, tmp_path / "run")
    ended = run_in_two("mtptrain", *fitting(["+recipe=pretrain", *settings[1:], "resume=auto", f"output_dir={run}"]))
    assert 2 in ended.codes
    assert 0 not in ended.codes
    lines = re.findall(r"^mtptrain: .*$", ended.errors, re.MULTILINE)
    assert len(lines) == 1
    assert "belongs to another run: +recipe distill -> pretrain, loss.divergence kl -> ce" in lines[0]
    assert lines[0].endswith("choose another output_dir (+recipe, train.optimizer cannot change within a run)")


def impatient_launcher(folder: Path, seconds: int) -> Path:
    """Write a copy of launch_torchrun.sh that waits only so long for torchrun to end after its processes."""
    (folder / "scripts").mkdir()
    for name in ("launch_torchrun.sh", "split_arguments.sh"):
        script = (SCRIPTS / name).read_text(encoding="utf-8").replace("patience=330", f"patience={seconds}")
        (folder / "scripts" / name).write_text(script, encoding="utf-8")
    launcher = folder / "scripts" / "launch_torchrun.sh"
    launcher.chmod(0o755)
    return launcher


def test_a_torchrun_that_outlives_its_processes_is_ended(tmp_path: Path) -> None:
    """As on a host that is cut off from the rendezvous."""
    launcher, stuck = impatient_launcher(tmp_path, 1), tmp_path / "torchrun"
    stuck.write_text("#!/usr/bin/env bash\nbash -c 'sleep 2; : mtptrain'\nexec sleep 100\n", encoding="utf-8")
    stuck.chmod(0o755)
    ended = subprocess.run(
        [launcher, "+recipe=distill"],
        env={**os.environ, "PYTHON": str(stuck)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 137
    assert "launch_torchrun: torchrun did not end although its processes have" in ended.stderr


TORCHRUN = """#!/usr/bin/env bash
"$(dirname "$0")/worker" mtptrain || exit 1
"""
WORKER = """#!/usr/bin/env bash
cd "$(dirname "$0")"
trap 'touch signalled; for ((i = 0; i < 600; i++)); do sleep 0.1; done; touch saved; exit 75' USR1
touch ready
for ((n = 0; n < 1200; n++)); do sleep 0.05; done
"""


def test_a_second_ctrl_c_ends_processes_that_still_save(tmp_path: Path) -> None:
    """Scripts take the places of torchrun and of a process; the test above has real ones, and one Ctrl-C."""
    for name, text in (("torchrun", TORCHRUN), ("worker", WORKER)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    process = start("launch_torchrun.sh", "+recipe=distill", python=tmp_path / "torchrun")
    for file in ("ready", "signalled"):
        deadline = time.monotonic() + 60
        while not (tmp_path / file).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert (code, (tmp_path / "saved").exists()) == (130, False)
    assert "launch_torchrun: the run ends after this step, which is saved; Ctrl-C again ends it at once" in errors


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ("--num_processes 2 distill engine=zero1", "+recipe=distill engine=zero1"),
        ("--num_processes 2 evaluate", "+recipe=evaluate"),
        ("--num_processes 2 --tee distill +recipe=plan", "+recipe=plan"),
        ("distill output_dir=R", "+recipe=distill output_dir=R resume=auto"),
        ("plan output_dir=R", "+recipe=plan output_dir=R"),
    ],
)
def test_a_word_names_the_recipe(given: str, settings: str, tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    command = [SCRIPTS / "launch_accelerate.sh", *given.split()]
    ended = subprocess.run(command, env={**os.environ, "PYTHON": str(echo)}, capture_output=True, text=True, check=True)
    assert ended.stdout.endswith(f" mtptrain {settings}\n")


HOSTFILES: list[tuple[str | None, str]] = [
    (None, "cannot be read; give a file of lines NAME slots=PROCESSES"),
    ("one slots=2\ntwo slots=many\n", "line 2:two slots=many is not NAME slots=PROCESSES"),
]


@pytest.mark.parametrize(("content", "reason"), HOSTFILES, ids=["absent", "malformed"])
def test_a_wrong_hostfile_is_named(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    code, errors = finish(start("launch_deepspeed.sh", "--hostfile", str(path), "+recipe=distill"))
    assert (code, errors) == (2, f"launch_deepspeed: --hostfile {path}: {reason}\n")


MISTAKES: list[tuple[dict[str, str], list[str], str]] = [
    ({"RANK": "0"}, [], r"LOCAL_RANK: is not set although RANK is; start every process through one of scripts/launch"),
    ({"WORLD_SIZE": "2"}, [], r"LOCAL_RANK: is not set although WORLD_SIZE is; start every process through"),
    ({"RANK": "0", "WORLD_SIZE": "3"}, [], r"train.batch_size=2: is the number .* 3 processes cannot share it evenly"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, ["backbone.placement=auto"], r"backbone.placement=auto: spreads layers within"),
    (
        {"RANK": "0", "WORLD_SIZE": "2"},
        ["backbone.placement=zero4"],
        r"backbone.placement=zero4: must be .*expert_parallel",
    ),
    ({"RANK": "0", "WORLD_SIZE": "two"}, [], r"WORLD_SIZE=two: must be a number; start every process through"),
    (
        {"RANK": "0", "WORLD_SIZE": "2"},
        ["+recipe=compare"],
        r"backbone.placement=replicate: .recipe=compare decodes texts, in one process .*2 were started",
    ),
]


@pytest.mark.parametrize(("variables", "more", "line"), MISTAKES)
def test_an_impossible_division_of_work_is_refused_before_anything_starts(
    variables: dict[str, str],
    more: list[str],
    line: str,
    light: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if len(variables) > 1 else {}
    for name, value in {**variables, **rest}.items():
        monkeypatch.setenv(name, value)
    recipe = [] if more[:1] == ["+recipe=compare"] else ["+recipe=distill"]
    checkpoints = [] if recipe else ["checkpoints=[stock,stock]"]
    assert run_main(*recipe, *light, *more, *checkpoints, f"output_dir={tmp_path / 'run'}") == 2
    assert re.match(f"mtptrain: {line}", capfd.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "run").exists()
