"""The matrix of backbones, sources of data, placements and recipes: a combination runs, or is refused with the reason."""

import json
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from mtptrain.backbone.placement import spread_layers
from mtptrain.recipes.doctor import UNHEALTHY
from mtptrain.evaluation.result import Evaluation, read_evaluation
from tests.command import read_metrics
from tests.conftest import save_backbone, save_release
from tests.recipes import matrix
from tests.shared import shared_folder
from tests.training.test_engines import run_in_two

FORMATS = {"shipped": save_backbone, "release": save_release}
ONE = ("alone", "auto")  # placements of one process
TWO = ("replicate", "expert_parallel", "zero3")
TASKS = [name for name, _ in matrix.jobs(Path(), Path(), Path(), "auto")]
DECODED = ("evaluate", "doctor", "compare", "export")
REFUSED = {
    **{
        ("replicate", task): r"backbone\.placement=replicate: .*set backbone\.placement=expert_parallel"
        for task in DECODED
    },
    **{("zero3", task): r"backbone\.placement=zero3: .*set backbone\.placement=expert_parallel" for task in DECODED},
    ("zero3", "distill-on_policy"): r"backbone\.placement=zero3: decodes nothing, .*expert_parallel",
}


def spread_on_one_device(folder: Path, jobs: list[matrix.Job], patch: pytest.MonkeyPatch) -> None:
    """Run commands with accelerate's hooks on every layer, as for layers on several devices."""
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def load_with_hooks(kind: Any, *arguments: Any, **options: Any) -> Any:
        model, report = load(kind, *arguments, **options)
        if layers := len(model.model.layers):
            accelerate.dispatch_model(model, dict.fromkeys(spread_layers(layers, 1), "cpu"), force_hooks=True)
        return model, report

    patch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(load_with_hooks))
    matrix.run(folder, jobs)


def run_all(folder: Path) -> None:
    """Run every cell, in `folder`/FORMAT/PLACEMENT."""
    corpus = folder / "corpus.jsonl"
    texts = [f"Line {number} of a {number % 7}th text, and one more." for number in range(40)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    together = []
    for kind, save in FORMATS.items():
        (folder / kind).mkdir()
        save(folder / kind / "backbone")
        for placement in (*ONE, *TWO):
            own = folder / kind / placement
            own.mkdir()
            setting = {"alone": "replicate"}.get(placement, placement)
            jobs = matrix.jobs(own, folder / kind / "backbone", corpus, setting)
            if placement in TWO:
                together.append((str(own), jobs))
            elif placement == "auto":
                with pytest.MonkeyPatch.context() as patch:
                    spread_on_one_device(own, jobs, patch)
            else:
                matrix.run(own, jobs)
    (folder / "jobs.json").write_text(json.dumps(together), encoding="utf-8")
    run_in_two("tests.recipes.matrix", str(folder / "jobs.json"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "matrix", run_all)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("placement", [*ONE, *TWO])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_combination_runs_or_is_refused_with_the_reason(kind: str, placement: str, task: str, cells: Path) -> None:
    folder = cells / kind / placement
    output = (folder / f"{task}.0.txt").read_text(encoding="utf-8")
    code, reason = int((folder / f"{task}.code").read_text(encoding="utf-8")), REFUSED.get((placement, task))
    assert "Traceback" not in output, output[-3000:]
    if reason is None:
        assert code == (UNHEALTHY if task == "doctor" else 0), output[-3000:]  # the random head gains nothing
        assert (folder / task).is_dir()
    else:
        lines = [line for line in output.splitlines() if line.startswith("mtptrain:")]
        assert (code, len(lines)) == (2, 1), output[-3000:]
        assert re.search(reason, lines[0])
        assert not (folder / task).exists()


@pytest.mark.parametrize("placement", ["auto", "expert_parallel"])
@pytest.mark.parametrize("task", ["distill-online", "distill-streams", "distill-on_policy", "evaluate"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_shared_backbone_gives_the_numbers_of_one_process(kind: str, task: str, placement: str, cells: Path) -> None:
    one, other = (figures(cells / kind / where / task) for where in ("alone", placement))
    assert one.certificate.passed
    assert other.certificate.passed
    for left, right in zip(one.heads, other.heads, strict=True):
        assert left.per_prompt == right.per_prompt
        assert left.teacher_forced.alpha == pytest.approx(right.teacher_forced.alpha, abs=1e-5)
    if task.startswith("distill"):
        losses = [
            [row["loss/step_1"] for row in read_metrics(cells / kind / where / task)[:2]]
            for where in ("alone", placement)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def figures(folder: Path) -> Evaluation:
    return read_evaluation(folder / "evaluation.json")
