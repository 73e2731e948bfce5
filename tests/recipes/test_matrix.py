"""Backbones x sources of data x placements x recipes: a combination runs, or is refused with the reason."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from mtptrain.backbone.placement import spread_layers
from mtptrain.errors import CHECK_FAILED
from mtptrain.evaluation.curve import read_curve
from mtptrain.evaluation.result import read_evaluation
from mtptrain.traces.file import read_trace_set
from tests.command import edit_tensors, read_metrics, tree
from tests.conftest import THREE_LAYERS, save_backbone, save_release
from tests.recipes import matrix
from tests.shared import shared_folder
from tests.warm import run_in_two

FORMATS = {"shipped": save_backbone, "release": save_release}
ONE = ("alone", "auto")  # placements of one process
TWO = ("replicate", "expert_parallel", "zero3")
TASKS = [name for name, _ in matrix.jobs(Path(), Path(), Path(), "auto")]
SHARED = {  # trainings that share the experts of the head too, by format and placement of the backbone
    ("release", "expert_parallel"): ["distill-online"],
    ("shipped", "expert_parallel"): ["pretrain", "distill-on_policy"],
    ("shipped", "replicate"): ["pretrain", "distill-on_policy"],
    ("release", "zero3"): ["distill-streams", "pretrain"],
}
DECODED = ("evaluate", "evaluate-all", "watch", "doctor", "compare", "export")
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
        save(folder / kind / "backbone", **THREE_LAYERS)
        for placement in (*ONE, *TWO):
            own = folder / kind / placement
            own.mkdir()
            setting = {"alone": "replicate"}.get(placement, placement)
            at_end = kind == "release" and placement in ("alone", "expert_parallel")
            jobs = matrix.jobs(
                own, folder / kind / "backbone", corpus, setting, at_end, SHARED.get((kind, placement), ())
            )
            if placement in TWO:
                together.append((str(own), jobs))
            elif placement == "auto":
                with pytest.MonkeyPatch.context() as patch:
                    spread_on_one_device(own, jobs, patch)
            else:
                matrix.run(own, jobs)
    together.append((str(folder), [generating_job(folder), damaged_job(folder, corpus)]))
    (folder / "jobs.json").write_text(json.dumps(together), encoding="utf-8")
    ended = run_in_two("tests.recipes.matrix", str(folder / "jobs.json"))
    assert ended.codes == (0, 0), ended.errors[-4000:]


def generating_job(folder: Path) -> matrix.Job:
    """Return a text on the screen, decoded by processes that share the backbone's experts."""
    settings = [f"backbone.path={folder / 'release' / 'backbone'}", "backbone.placement=expert_parallel"]
    return "generate", ["+recipe=generate", *settings, "prompt=Line 7 of", "generate.plain=true"]


def damaged_job(folder: Path, corpus: Path) -> matrix.Job:
    """Return an evaluation on a release with a tensor of another shape, which every process notices by itself."""
    backbone = shutil.copytree(folder / "release" / "backbone", folder / "damaged")
    edit_tensors("model-00003-of-00006.safetensors", cut_first)(backbone)
    settings = dict(matrix.jobs(folder, backbone, corpus, "expert_parallel"))["evaluate"]
    return "damaged", ["checkpoint=stock" if one.startswith("checkpoint=") else one for one in settings]


def cut_first(tensors: dict[str, torch.Tensor]) -> None:
    """Cut the query projection of a layer to seven rows."""
    name = next(name for name in tensors if name.endswith("attn.wq_a.weight"))
    tensors[name] = tensors[name][:7].clone()


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
        assert code == (CHECK_FAILED if task == "doctor" else 0), output[-3000:]  # the random head gains nothing
        assert (folder / task).is_dir()
    else:
        lines = [line for line in output.splitlines() if line.startswith("mtptrain:")]
        assert (code, len(lines)) == (2, 1), output[-3000:]
        assert re.search(reason, lines[0])
        assert not (folder / task).exists()


@pytest.mark.parametrize("placement", ["auto", "expert_parallel"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_shared_backbone_measures_what_a_whole_one_measures(kind: str, placement: str, cells: Path) -> None:
    compare_evaluations(cells / kind / "alone" / "evaluate", cells / kind / placement / "evaluate")


@pytest.mark.parametrize("task", ["evaluate-all", "watch"])
@pytest.mark.parametrize("placement", ["auto", "expert_parallel"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_shared_backbone_measures_all_checkpoints_as_a_whole_one_does(
    kind: str, placement: str, task: str, cells: Path
) -> None:
    one, other = (read_curve(cells / kind / where / task, "path") for where in ("alone", placement))
    assert len(one.points) > 0
    assert [point.replay for point in one.points] == [point.replay for point in other.points]


def test_a_head_is_measured_at_the_end_of_its_training_by_the_same_processes(cells: Path) -> None:
    one, two = (cells / "release" / placement / "distill-online" for placement in ("alone", "expert_parallel"))
    compare_evaluations(one, two)


@pytest.mark.parametrize("placement", ["alone", "expert_parallel"])
def test_an_export_of_tensors_writes_the_weights_of_a_measured_one(placement: str, cells: Path) -> None:
    measured, compared = (cells / "release" / placement / name for name in ("export", "export-tensors"))
    weights = {name: digest for name, digest in tree(measured).items() if name.endswith(".safetensors")}
    assert len(weights) == 6
    assert weights.items() <= tree(compared).items()


@pytest.mark.parametrize("placement", ["alone", "expert_parallel"])
def test_weights_that_are_kept_as_stored_measure_what_decoded_ones_measure(placement: str, cells: Path) -> None:
    compare_evaluations(cells / "release" / "alone" / "evaluate", cells / "release" / placement / "evaluate-kept")


@pytest.mark.parametrize("placement", ["auto", *TWO])
@pytest.mark.parametrize("task", ["distill-online", "distill-streams", "distill-on_policy", "pretrain"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_shared_backbone_trains_as_a_whole_one(kind: str, task: str, placement: str, cells: Path) -> None:
    if (placement, task) in REFUSED:
        pytest.skip("refused")
    alone, other = (read_metrics(cells / kind / where / task) for where in ("alone", placement))
    if placement == "zero3":  # does not decode, hence replays nothing
        alone = [row for row in alone if "loss/step_1" in row]
    assert len(alone) == len(other) > 1
    for left, right in zip(alone, other, strict=True):
        for name in [name for name in left if name.startswith(("loss/", "alpha/", "replay/"))]:
            assert right[name] == pytest.approx(left[name], rel=1e-4), name


def test_a_mistake_that_every_process_meets_is_one_line(cells: Path) -> None:
    outputs = [(cells / f"damaged.{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    lines = [line for output in outputs for line in output.splitlines() if "mtptrain:" in line]
    assert (cells / "damaged.code").read_text(encoding="utf-8") == "2"
    assert len(lines) == 1, outputs
    assert "Traceback" not in "".join(outputs)


def compare_evaluations(one: Path, other: Path) -> None:
    left, right = (read_evaluation(folder / "evaluation.json", "path") for folder in (one, other))
    assert left.certificate.passed
    assert right.certificate.passed
    texts = [[trace.tokens for trace in read_trace_set(folder / "traces.jsonl").traces] for folder in (one, other)]
    assert texts[0] == texts[1]
    for head, shared in zip(left.heads, right.heads, strict=True):
        assert head.per_prompt == shared.per_prompt
        assert head.teacher_forced.alpha == pytest.approx(shared.teacher_forced.alpha, abs=1e-5)


def test_one_process_prints_the_text_of_a_shared_backbone(cells: Path) -> None:
    output, other = ((cells / f"generate.{number}.txt").read_text(encoding="utf-8") for number in (0, 1))
    assert (cells / "generate.code").read_text(encoding="utf-8") == "0", output[-3000:]
    assert output.splitlines()[-1] == f"both texts are identical: {matrix.NEW_TOKENS} tokens"
    assert "identical" not in other
