"""Exports whose tensors are compared and whose acceptance is not measured."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mtptrain.backbone import load
from mtptrain.recipes import export as recipe
from mtptrain.training.checkpoint import find_checkpoint
from tests.command import edit_tensors, run_main, tree
from tests.export.exporting import export, read_record

TENSORS = ("target=vllm", "export.check=tensors")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make loading a backbone fail."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr(load, "load_backbone", fail)


@pytest.mark.usefixtures("no_weights")
def test_comparing_tensors_writes_the_measured_export_without_the_backbone(
    exported: Path, settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record, measured = export(settings, tmp_path / "X", *TENSORS), read_record(exported)
    printed = capfd.readouterr().err
    weights, others = ({n: h for n, h in tree(f).items() if n.endswith("rs")} for f in (exported, tmp_path / "X"))
    assert weights == others
    for same in ("errors", "changed", "untouched", "scheme", "draft_length"):
        assert record[same] == measured[same]
    assert record["acceptance"] is None
    card = ModelCard.load(tmp_path / "X" / "README.md")
    assert "model-index" not in card.data.to_dict()
    for text in (card.text, printed):
        assert "Acceptance was not measured: export.check=tensors compares tensors alone." in text
        assert not re.search(r"NOT BETTER|acceptance length|Tokens a pass", text)


@pytest.mark.usefixtures("no_weights")
def test_a_head_of_another_backbone_is_refused_without_loading_one(
    settings: list[str], backbone_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["target=hf", "export.check=tensors", f"backbone.path={backbone_folder}", f"output_dir={tmp_path}/X"]
    assert run_main("+recipe=export", *settings, *arguments) == 2
    assert re.search(r"^mtptrain: checkpoint=.*backbone", capfd.readouterr().err, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
def test_a_tensor_that_does_not_come_back_is_refused(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = recipe.write_folder

    def damage(*arguments: Any) -> None:
        plain(*arguments)
        edit_tensors("model-00007-of-00007.safetensors", lambda head: head["mtp.0.norm.weight"].zero_())(arguments[-1])

    monkeypatch.setattr(recipe, "write_folder", damage)
    assert run_main("+recipe=export", *settings, *TENSORS, f"output_dir={tmp_path}/X") == 2
    line = "mtptrain: mtp.0.norm.weight: is not in the export as it was trained; nothing was kept"
    assert line in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_best_checkpoint_remembers_the_prompts_that_chose_it_in_every_export(
    settings: list[str], light: list[str], release_folder: Path, tmp_path: Path
) -> None:
    arguments = [f"backbone.path={release_folder}", "evaluation.every=1", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *arguments, f"output_dir={tmp_path}/run") == 0
    best = find_checkpoint(tmp_path / "run" / "checkpoints" / "best")
    assert best.selection() is not None
    for target in ("sglang", "llama_cpp", "hf"):
        chosen = [f"checkpoint={best.folder}", f"target={target}", "export.check=tensors"]
        export(settings, tmp_path / target, *chosen)
        assert find_checkpoint(tmp_path / target).selection() == best.selection()
