import json
from pathlib import Path

import yaml

from mtptrain.config import MtpMode, OptimizerName
from mtptrain.export.origin import Origin, find_origin, own_evaluation
from mtptrain.training.checkpoint import Checkpoint, HeadIdentity

IDENTITY = HeadIdentity("distill", "f", MtpMode.shared, 1, 3, "all", OptimizerName.adamw, {}, None)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / "step_00000007", IDENTITY, 7, {"tokens": 12345})


def test_the_origin_is_read_from_the_files_beside_model_and_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash" / "snapshots" / "0"
    run = tmp_path / "run"
    source.mkdir(parents=True)
    run.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# V4\n")
    settings = {"data": {"source": "text", "path": "talk.jsonl", "mixture": [], "workers": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "provenance.json").write_text(json.dumps({"started": "then"}))
    origin = find_origin(checkpoint(run), source, str(source))
    assert origin.base_model == "deepseek-ai/DeepSeek-V4-Flash"
    assert origin.license == "mit"
    assert origin.data == "source text, path talk.jsonl, 12,345 tokens"
    assert origin.training == {"started": "then"}


def test_a_hub_id_is_the_base_model(tmp_path: Path) -> None:
    assert find_origin(checkpoint(tmp_path), tmp_path, "deepseek-ai/V4").base_model == "deepseek-ai/V4"


def test_what_is_not_recorded_stays_open(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    (tmp_path / "evaluation.json").write_text("{}")
    assert find_origin(checkpoint(tmp_path), tmp_path, None) == Origin(None, None, None, {})
    assert own_evaluation(checkpoint(tmp_path)) is None
