"""Run `python -m mtptrain` from a test: in this process, or in another one if the process matters."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file
from torch import Tensor

from mtptrain.release.shards import INDEX
from mtptrain.run.storage import sha256_file
from tests.light import loading_once, measuring_little
from tests.warm import ROOT, WarmProcess


class Light(str):
    """A setting that keeps runs small; a recipe that does not read it runs without it."""

    __slots__ = ()


# Sizes of texts and measurements that keep a run on the random backbone small.
SMALL = [
    Light(setting)
    for setting in (
        "data.heldout_every=3",
        "data.sequence_length=32",
        "decoding.draft_length=2",
        "decoding.max_new_tokens=6",
        "evaluation.num_prompts=2",
        "evaluation.prompt_tokens=12",
        "evaluation.timed_prompts=1",
        "evaluation.batch_sizes=[1]",
        "evaluation.heldout_sequences=2",
    )
]
Refused = Callable[..., str]  # the fixture that runs a command that must fail


def fitting(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command without those `Light` settings that its recipe does not read."""
    from mtptrain.config import (
        HELDOUT,
        DataConfig,
        DataSource,
        EvaluationConfig,
        ExportCheck,
        ExportConfig,
        GenerateConfig,
        MixtureConfig,
        Placement,
        ReleaseConfig,
        ReleaseSize,
        RunConfig,
    )
    from mtptrain.recipes import find_recipe

    recipe = next((one.removeprefix("+recipe=") for one in arguments if one.startswith("+recipe=")), None)
    if recipe is None or not any(isinstance(one, Light) for one in arguments):
        return list(arguments)
    source = {"distill_on_policy": "on_policy"}.get(recipe, "stdlib")
    source = next((one.removeprefix("data=") for one in reversed(arguments) if one.startswith("data=")), source)
    source = source if source in {"chat", *(one.value for one in DataSource)} else "stdlib"
    is_mixed = any(one.startswith("data.mixture") for one in arguments)
    has_traces = any(one.startswith("evaluation.traces=") for one in arguments)
    has_prompts = not has_traces and any(one.startswith("prompts=") for one in arguments)
    source = "text" if is_mixed else source
    has_path = source != "on_policy" or any(one.startswith(("data.path=", "on_policy.prompts=")) for one in arguments)
    every = [one.partition("=")[2] for one in arguments if one.startswith("evaluation.every=")]
    evaluation = EvaluationConfig(traces="traces" if has_traces else None, every=int(every[-1]) if every else 0)
    at_end = [one for one in arguments if one.startswith("evaluate_at_end=")][-1:] != ["evaluate_at_end=false"]
    placement = Placement.zero3 if "backbone.placement=zero3" in arguments else Placement.replicate
    is_random, is_servable = "release.random=true" in arguments, "release.size=servable" in arguments
    size = ReleaseSize.servable if is_random and is_servable else ReleaseSize.tiny
    release = ReleaseConfig(random=is_random, size=size)
    is_compared = "export.check=tensors" in arguments
    export = ExportConfig(check=ExportCheck.tensors if is_compared else ExportCheck.replay)
    data = DataConfig(
        source=DataSource.text if source == "chat" else DataSource(source),
        path=None if is_mixed or not has_path else "text",
        mixture=[MixtureConfig(path="text")] if is_mixed else [],
    )
    task = recipe if find_spec(f"mtptrain.recipes.{recipe}") else "distill"  # other recipes of the tests train a head
    prompts = "file" if has_prompts else HELDOUT
    config = RunConfig(task=task, data=data, evaluation=evaluation, prompts=prompts, release=release, export=export)
    config.evaluate_at_end, config.backbone.placement = at_end, placement
    config.generate = GenerateConfig(raw="generate.raw=true" in arguments)
    read = set(find_recipe(task).reads(config))
    if "data.source" in read:
        read.add("data")
    return [one for one in arguments if not isinstance(one, Light) or one.partition("=")[0] in read]


def run_main(*arguments: str) -> int:
    """Run the command in this process; return its exit code. `Light` settings make it cheaper (`tests/light.py`)."""
    from hydra.core.global_hydra import GlobalHydra  # the tests of kernels run without Hydra installed

    from mtptrain import cli
    from tests.composing import composing_once

    GlobalHydra.instance().clear()
    is_light = any(isinstance(one, Light) for one in arguments)
    with (
        patch.object(sys, "argv", ["mtptrain", *fitting(arguments)]),
        composing_once(),
        ExitStack() as stack,
    ):
        for cheaper in (measuring_little, loading_once) if is_light else ():
            stack.enter_context(cheaper())
        try:
            cli.main()
        except SystemExit as ending:
            return int(ending.code or 0)
        finally:
            GlobalHydra.instance().clear()
    return 0


def start_process(*arguments: str, folder: Path) -> WarmProcess:
    """Start the command in another process, whose working directory is `folder`."""
    return WarmProcess("mtptrain", *fitting(arguments), folder=folder)


def kill_when(process: WarmProcess, is_due: Callable[[], object]) -> None:
    """Kill a command with SIGKILL as soon as `is_due()` is true; it must not have ended before."""
    deadline = time.monotonic() + 120
    while not is_due():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()


def hold_folder(folder: Path, beside: bool = False) -> "subprocess.Popen[str]":
    """Start a process that holds a folder's lock until it is killed or its input ends."""
    program = (
        "import sys; from pathlib import Path; from mtptrain.run.folder_lock import FolderLock; lock = FolderLock(); "
        "lock.take(Path(sys.argv[1]), 'output_dir', sys.argv[2] == 'True'); print('held', flush=True); "
        "sys.stdin.read(); lock.close()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder, str(beside)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def run_process(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """Run the command in a new process, as a user does; return its exit code, stdout and stderr."""
    command = [sys.executable, "-m", "mtptrain", *fitting(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of one shard of a folder and updates the folder's index."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
        listed = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        edit_json(folder / INDEX, lambda index: index.update(weight_map=listed))

    return act


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes; a program meets the limit like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
