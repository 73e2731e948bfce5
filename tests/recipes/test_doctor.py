"""The doctor reports on any head; its exit code separates sound from faulty ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtptrain.doctor.summary import WIRINGS_NOTE
from tests.command import edit_tensors, run_main

LAST = "model-00007-of-00007.safetensors"


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.") and old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def spoiled(tensors: dict[str, Tensor]) -> None:
    tensors["mtp.0.enorm.weight"][0] = torch.nan
    tensors["mtp.0.e_proj.scale"].view(torch.uint8).fill_(255)


# A change of a release's head, the kind of fault, the number of faulty tensors, and the start of one line.
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, int, str]] = {
    "names of another code base": (renamed(".attn.", ".self_attn."), "missing", 13, "mtp.0.attn.attn_sink"),
    "no numbers": (spoiled, "non_finite", 2, "mtp.0.enorm.weight: holds NaN or infinity"),
    "no enorm": (lambda tensors: tensors.pop("mtp.0.enorm.weight"), "missing", 1, "mtp.0.enorm.weight"),
}


def diagnosed(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "doctor.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_release_whose_head_is_wrong_gets_a_report(
    fault: str, release_folder: Path, light: list[str], tmp_path: Path
) -> None:
    folder, run = shutil.copytree(release_folder, tmp_path / "R"), tmp_path / "run"
    change, kind, count, line = FAULTS[fault]
    edit_tensors(LAST, change)(folder)
    settings = [*light, f"backbone.path={folder}", "checkpoint=stock", f"output_dir={run}"]
    assert run_main("+recipe=doctor", *settings) == 3
    result = diagnosed(run)
    faults = result["tensors"][kind]
    assert len(faults) == count
    assert any(fault.startswith(line) for fault in faults)
    assert any(line in finding for finding in result["diagnosis"]["findings"])
    assert result["wirings"] is None
    assert (run / "provenance.json").is_file()
    assert not result["tensors"]["is_dspark"]


def test_a_useless_head_is_not_diagnosed_as_sound(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random backbone's random head under every wiring; these prompts separate no two wirings."""
    assert run_main("+recipe=doctor", *light, "checkpoint=stock", f"output_dir={tmp_path}") == 3
    result = diagnosed(tmp_path)
    assert result["tensors"]["errors"] == 0
    diagnosis = result["diagnosis"]
    assert not diagnosis["healthy"]
    assert diagnosis["best"] == result["wirings"][0]["wiring"] == "right"
    assert "own_keys" in diagnosis["alike"]
    assert f"no difference between {', '.join(diagnosis['alike'])} and the right wiring" in diagnosis["verdict"]
    assert result["controls"]["all_accept"]["passed"]
    assert WIRINGS_NOTE in " ".join(capsys.readouterr().out.split())


def test_a_trained_head_is_examined_beside_a_broken_stock_head(
    release_folder: Path, light: list[str], tmp_path: Path
) -> None:
    """The stock head serves for comparison only; its faults are not the trained head's."""
    folder, trained = shutil.copytree(release_folder, tmp_path / "R"), tmp_path / "trained"
    edit_tensors(LAST, spoiled)(folder)
    settings = [*light, f"backbone.path={folder}"]
    training = ["mtp.init=fresh", "train.steps=1", "evaluate_at_end=false", f"output_dir={trained}"]
    assert run_main("+recipe=distill", *settings, *training) == 0
    assert run_main("+recipe=doctor", *settings, f"checkpoint={trained}", f"output_dir={tmp_path / 'run'}") in (0, 3)
    result = diagnosed(tmp_path / "run")
    assert result["tensors"]["errors"] == 0
    assert result["wirings"] is not None
