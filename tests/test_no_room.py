"""Memory or a disk without room ends a run with one line, and nothing half-written."""

import re
from pathlib import Path

import pytest
import torch

from mtptrain.training.trainer import Trainer
from tests.command import largest_file, run_main, tree


@pytest.mark.parametrize(
    ("is_on_gpu", "reason"),
    [(True, "Tried to allocate 20.00 GiB"), (False, "you tried to allocate 70368744177664 bytes")],
)
def test_memory_that_does_not_suffice_is_one_line(
    is_on_gpu: bool,
    reason: str,
    light: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(*_: object) -> None:
        if is_on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")
        torch.empty(2**46, dtype=torch.uint8)

    monkeypatch.setattr(Trainer, "run", run)
    assert run_main("+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}/run") == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith(f"mtptrain: out of memory ({reason}); less is needed with a smaller train.batch_size, ")
    assert line.endswith("; nothing is saved yet; start it again")


def test_a_disk_that_fills_during_a_checkpoint_costs_only_that_one(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*arguments, "train.steps=1") == 0
    arguments.append("resume_allow=[train.steps]")
    first = tmp_path / "checkpoints" / "step_00000001"
    before = tree(first)
    for file in ("module.safetensors", "optimizer.safetensors"):
        capfd.readouterr()
        with largest_file((first / file).stat().st_size - 1):
            assert run_main(*arguments, "resume=auto") == 2
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        line = errors.splitlines()[-1]
        assert line.startswith(f"mtptrain: output_dir={tmp_path}: a file would be larger than the system allows")
        assert line.endswith("free some room and continue with resume=auto")
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
        assert tree(first) == before
    assert run_main(*arguments, "resume=auto") == 0
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()


def test_a_disk_that_is_full_from_the_start_leaves_no_half_file(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with largest_file(1000):  # below config.yaml's size, above that of the captured line
        assert run_main("+recipe=evaluate", *light, "checkpoint=stock", f"output_dir={tmp_path}") == 2
    line = rf"^mtptrain: output_dir={tmp_path}: a file .*; free some room; nothing is saved yet; start it again$"
    assert re.search(line, capfd.readouterr().err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
