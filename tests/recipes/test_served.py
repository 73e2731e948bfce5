"""Settings of a server's numerics and of steps past the depth, through whole commands."""

import json
from pathlib import Path

import pytest

from mtptrain.config import BackboneConfig, DecodingConfig, RunConfig, ServedAs
from mtptrain.mtp.numerics import SERVED, Numerics
from mtptrain.recipes.session import Session
from mtptrain.run.folder import open_run_folder
from mtptrain.training.checkpoint import find_checkpoint
from tests.command import read_metrics, run_main

EXPECTED = "replay/expected_length_3"


def test_a_head_trained_with_the_zeroed_embedding_is_loaded_as_it_was_trained(
    light: list[str], backbone_folder: Path, tmp_path: Path
) -> None:
    losses = []
    for name, more in (("zeroed", ["mtp.zero_first_embedding=true"]), ("plain", [])):
        arguments = ["evaluate_at_end=false", *more, f"output_dir={tmp_path / name}"]
        assert run_main("+recipe=distill", *light, *arguments) == 0
        losses.append(read_metrics(tmp_path / name)[0]["loss/step_1"])
    assert losses[0] != losses[1]
    checkpoint = find_checkpoint(tmp_path / "zeroed")
    for served_as, numerics in (
        (ServedAs.exact, Numerics(zero_first=True)),
        (ServedAs.sglang, SERVED[ServedAs.sglang]),
    ):
        config = RunConfig(
            task="evaluate",
            backbone=BackboneConfig(path=str(backbone_folder)),
            decoding=DecodingConfig(served_as=served_as),
            output_dir=str(tmp_path / "run"),
        )
        head = Session(config, open_run_folder(config, {})).trained_head(checkpoint)
        assert head.stack.numerics == numerics


def test_a_stacked_head_is_probed_and_measured_as_vllm_runs_it(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stacked = ["mtp.mode=stacked", "mtp.depth=2", "decoding.draft_length=3", "evaluation.every=1"]
    served = ["decoding.past_depth=wrap_around", "decoding.served_as=vllm", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *stacked, *served) == 0
    lengths = [row[EXPECTED] for row in read_metrics(tmp_path) if EXPECTED in row]
    assert len(lengths) == 2
    assert min(lengths) >= 1
    assert "a head in training is measured as it is trained; decoding.served_as=vllm holds" in capfd.readouterr().err
    evaluation = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["certificate"]["passed"]
    assert (evaluation["policy"]["past_depth"], evaluation["policy"]["served_as"]) == ("wrap_around", "vllm")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Drafts past the depth are timed with the last module repeated, not as past_depth=wrap_around." in page
