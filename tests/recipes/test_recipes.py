"""Every recipe, end to end, for two steps on a random backbone."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mtptrain.config import BackboneConfig, DataConfig, DataSource, LossName, MtpConfig, RunConfig, TrainConfig
from mtptrain.mtp.start import stock_tensors
from mtptrain.recipes.distill import train_head
from mtptrain.recipes.session import Session
from mtptrain.run.folder import open_run_folder
from mtptrain.training.checkpoint import find_checkpoint
from tests.command import ROOT, read_json, read_metrics, run_main, tree
from tests.recipes.drawn import check_drawn

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
CLUSTERS = {"flash_1node", "flash_2nodes", "pro_cluster"}  # too large to run here: test_plan.py plans them
DIVERGENCES = [name.value for name in LossName if name.value not in ("ce", "kl")]
SHAPE = [
    "backbone.shape.vocab_size=280",
    "backbone.shape.hidden_size=32",
    "backbone.shape.layer_types=[csa,hca]",
    "backbone.shape.num_attention_heads=2",
    "backbone.shape.sliding_window=9",
    "backbone.shape.num_experts=4",
    "backbone.shape.expert_size=16",
]


def trained_tensors(folder: Path, step: int = 2) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "module.safetensors")


def check_record(folder: Path, recipe: str) -> None:
    """The files that every run leaves."""
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["task"] == recipe
    provenance = read_json(folder / "provenance.json")
    assert provenance["command"][:3] == ["python", "-m", "mtptrain"]
    assert f"+recipe={recipe}" in provenance["command"]
    assert provenance["versions"]["torch"] == torch.__version__  # with its build, such as +cpu
    assert provenance["versions"].get("cuda") == torch.version.cuda
    assert provenance["hardware"]["torch_threads"] == 1
    assert provenance["seed"] == 0
    assert not list(folder.rglob("*.tmp"))


def check_training(folder: Path) -> None:
    """Two logged steps and their checkpoints."""
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000001", "step_00000002"]


def check_evaluation(folder: Path, heads: list[str]) -> dict[str, Any]:
    """A whole evaluation of these heads, with a certificate that passed."""
    evaluation = read_json(folder / "evaluation.json")
    assert [head["name"] for head in evaluation["heads"]] == heads
    assert evaluation["certificate"]["passed"]
    assert all(set(head["replay"]) == {"1", "2"} for head in evaluation["heads"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert not re.search(r"""(src|href)=["']?https?:|@import""", page)
    return evaluation


@pytest.fixture(scope="module")
def distilled(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distill run in shared mode with three steps."""
    folder = tmp_path_factory.mktemp("distilled")
    assert run_main("+recipe=distill", *light, "mtp.steps=3", f"output_dir={folder}") == 0
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(f"+recipe={recipe}", "--cfg", "job") == 0
    others = {"backbone_grow": "backbone", **dict.fromkeys(["distill_on_policy", *CLUSTERS], "distill")}
    assert yaml.safe_load(capfd.readouterr().out)["task"] == others.get(recipe, recipe)


def test_every_recipe_is_run_in_this_file() -> None:
    # test_plan.py, tests/export/test_export.py, test_collect.py, test_on_policy.py, test_report.py, test_curve.py,
    # test_generate.py, tests/backbone/test_grow.py, tests/serving/test_measure_server.py
    elsewhere = {"plan", "export", "collect", "distill_on_policy", "report", "watch", "generate", "backbone_grow"}
    elsewhere |= {"measure_server"}
    here = {"backbone", "compare", "distill", "doctor", "evaluate", "mini_release", "pretrain"}
    assert here | elsewhere | CLUSTERS == set(RECIPES)


def test_distill_trains_measures_and_records(distilled: Path) -> None:
    check_record(distilled, "distill")
    check_training(distilled)
    evaluation = check_evaluation(distilled, ["stock", "trained"])
    assert set(evaluation["gain"]) == {"1", "2"}
    assert {f"alpha/step_{k}" for k in (1, 2, 3)} <= read_metrics(distilled)[0].keys()
    check_drawn(distilled, "report.html", 12)


@pytest.mark.parametrize("router_bias_rate", [0.0, 0.01])
def test_measuring_during_training_is_logged_and_changes_nothing(
    router_bias_rate: float, distilled: Path, light: list[str], tmp_path: Path
) -> None:
    arguments = [*light, "mtp.steps=3", "train.log_every=2", f"train.router_bias_rate={router_bias_rate}"]
    arguments += ["evaluate_at_end=false"]
    plain, probed = distilled if router_bias_rate == 0 else tmp_path / "plain", tmp_path / "probed"
    if plain != distilled:
        assert run_main("+recipe=distill", *arguments, f"output_dir={plain}") == 0
    assert run_main("+recipe=distill", *arguments, "evaluation.every=1", f"output_dir={probed}") == 0
    measured = [row for row in read_metrics(probed) if "replay/acceptance_length_2" in row]
    assert [row["step"] for row in measured] == [1, 2]
    assert all(0 < row[f"heldout/alpha_{k}"] < 1 for row in measured for k in (1, 2, 3))
    assert (probed / "checkpoints" / "best" / "checkpoint.json").is_file()
    left, right = trained_tensors(plain), trained_tensors(probed)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_pretrain_trains_measures_and_records(light: list[str], tmp_path: Path) -> None:
    assert run_main("+recipe=pretrain", *light, f"output_dir={tmp_path}") == 0
    check_record(tmp_path, "pretrain")
    check_training(tmp_path)
    check_evaluation(tmp_path, ["stock", "trained"])


def test_a_trained_backbone_and_its_stock_head_can_be_evaluated(light: list[str], tmp_path: Path) -> None:
    stock = [argument.replace("train.", "stock_head.") for argument in light if argument.startswith("train.")]
    made = tmp_path / "made"
    assert run_main("+recipe=backbone", *light, "backbone.path=null", *stock, *SHAPE, f"output_dir={made}") == 0
    check_record(made, "backbone")
    check_training(made)
    check_training(made / "stock_head")
    card = (made / "backbone" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "bits a byte" in card
    arguments = [*light, f"backbone.path={made}/backbone", "checkpoint=stock", f"output_dir={tmp_path / 'measured'}"]
    assert run_main("+recipe=evaluate", *arguments) == 0
    check_evaluation(tmp_path / "measured", ["stock"])
    deeper = [*light, "backbone.path=null", *stock, *SHAPE, "backbone.shape.layer_types=[csa,csa,hca]"]
    deeper += [f"backbone.grow_from={made}/backbone", f"output_dir={tmp_path / 'grown'}"]
    assert run_main("+recipe=backbone", *deeper) == 0
    config = read_json(tmp_path / "grown" / "backbone" / "config.json")
    assert config["num_hidden_layers"] == 3


def test_evaluate_measures_the_stock_head(light: list[str], tmp_path: Path) -> None:
    sizes = "evaluation.batch_sizes=[1,3]"  # more than there are prompts
    assert run_main("+recipe=evaluate", *light, sizes, "checkpoint=stock", f"output_dir={tmp_path}") == 0
    check_record(tmp_path, "evaluate")
    evaluation = check_evaluation(tmp_path, ["stock"])
    assert evaluation["gain"] is None
    assert list(evaluation["speedup"]) == list(evaluation["steps"]) == ["1", "3"]


def test_a_run_its_checkpoints_and_the_newest_of_them_name_one_checkpoint(distilled: Path) -> None:
    newest = "checkpoints/step_00000002"
    found = [find_checkpoint(distilled / inside).folder for inside in ("", "checkpoints", newest)]
    assert found == [distilled / newest] * 3


def test_evaluating_a_checkpoint_repeats_what_its_run_measured(
    distilled: Path, light: list[str], tmp_path: Path
) -> None:
    arguments = [*light, f"checkpoint={distilled}", f"output_dir={tmp_path}"]
    assert run_main("+recipe=evaluate", *arguments) == 0
    again, first = check_evaluation(tmp_path, ["stock", "trained"]), read_json(distilled / "evaluation.json")
    for left, right in zip(again["heads"], first["heads"], strict=True):
        assert left["replay"] == right["replay"]
        assert left["teacher_forced"] == right["teacher_forced"]


def test_the_doctor_names_what_is_wrong_and_says_so_by_its_exit_code(
    distilled: Path, light: list[str], tmp_path: Path
) -> None:
    """A random backbone's head drafts nothing worth verifying, whichever way it is fed."""
    assert run_main("+recipe=doctor", *light, f"checkpoint={distilled}", f"output_dir={tmp_path}") == 3
    check_record(tmp_path, "doctor")
    result = read_json(tmp_path / "doctor.json")
    assert result["tensors"]["errors"] == 0
    assert not result["diagnosis"]["healthy"]
    assert result["wirings"][0]["wiring"] == "right"
    assert result["controls"]["all_accept"]["passed"]


def test_compare_measures_each_head_against_the_first(distilled: Path, light: list[str], tmp_path: Path) -> None:
    heads = f"checkpoints=[stock,{distilled},{distilled}/checkpoints/step_00000001]"
    assert run_main("+recipe=compare", *light, heads, f"output_dir={tmp_path}") == 0
    check_record(tmp_path, "compare")
    comparison = read_json(tmp_path / "comparison.json")
    assert len(comparison["heads"]) == 3
    assert len(comparison["comparisons"]) == 2
    measured = read_json(distilled / "evaluation.json")["heads"]
    assert [head["replay"] for head in comparison["heads"][:2]] == [head["replay"] for head in measured]
    check_drawn(tmp_path, "comparison.html", 4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_other_divergence_trains_a_stack_of_two(divergence: str, light: list[str], tmp_path: Path) -> None:
    arguments = ["mtp.mode=stacked", "mtp.depth=2", f"loss.divergence={divergence}", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *arguments, f"output_dir={tmp_path}") == 0
    check_training(tmp_path)
    assert {name.split(".")[1] for name in trained_tensors(tmp_path)} == {"0", "1"}
    assert not (tmp_path / "evaluation.json").exists()


def test_a_stack_of_two_is_trained_on_kl_and_measured(light: list[str], tmp_path: Path) -> None:
    arguments = ["mtp.mode=stacked", "mtp.depth=2", "mtp.steps=2", "loss.divergence=kl", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    check_training(tmp_path)
    assert {name.split(".")[1] for name in trained_tensors(tmp_path)} == {"0", "1"}
    trained = check_evaluation(tmp_path, ["stock", "trained"])["heads"][1]
    assert (trained["mode"], trained["depth"]) == ("stacked", 2)


def test_a_run_starts_from_another_runs_head(distilled: Path, light: list[str], tmp_path: Path) -> None:
    # With a learning rate far below fp32's resolution the head stays what it started as.
    arguments = [f"mtp.init={distilled}", "train.learning_rate=1e-30", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *arguments, f"output_dir={tmp_path}") == 0
    start, end = trained_tensors(distilled), trained_tensors(tmp_path)
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_a_backbone_without_stock_head_is_trained_and_measured_alone(
    backbone_folder: Path, light: list[str], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in backbone_folder.iterdir():
        if path.name != "mtp.safetensors":
            (bare / path.name).symlink_to(path)
    run = tmp_path / "run"
    assert run_main("+recipe=distill", *light, f"backbone.path={bare}", "mtp.init=fresh", f"output_dir={run}") == 0
    check_evaluation(run, ["trained"])
    again = [*light, f"backbone.path={bare}", f"checkpoint={run}", f"output_dir={tmp_path / 'again'}"]
    assert run_main("+recipe=evaluate", *again) == 0
    check_evaluation(tmp_path / "again", ["trained"])


def test_training_changes_the_head_and_nothing_of_the_backbone(
    backbone_folder: Path, corpus_file: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        task="distill",
        output_dir=str(tmp_path / "run"),
        backbone=BackboneConfig(path=str(backbone_folder)),
        data=DataConfig(source=DataSource.text, path=str(corpus_file), sequence_length=33),
        mtp=MtpConfig(steps=3),
        train=TrainConfig(steps=2, batch_size=1, warmup_steps=0, router_bias_rate=0.01),
        evaluate_at_end=False,
    )
    files = tree(backbone_folder)
    folder = open_run_folder(config, {})
    session = Session(config, folder)
    backbone = session.backbone
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    stack = train_head(session, folder.open_trackers())
    after, start = backbone.model.state_dict(), stock_tensors(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tree(backbone_folder) == files
    trained = stack.state_dict()
    assert trained.keys() == start.keys()
    still = [name for name in start if torch.equal(start[name], trained[name])]
    assert still == []


def test_bf16_trains_on_a_cpu_with_fp32_masters(light: list[str], tmp_path: Path) -> None:
    assert run_main("+recipe=distill", *light, "precision=bf16", "evaluate_at_end=false", f"output_dir={tmp_path}") == 0
    check_training(tmp_path)
    first, second = trained_tensors(tmp_path, 1), trained_tensors(tmp_path, 2)
    assert {value.dtype for value in first.values() if value.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", ["release", "base"])
def test_a_miniature_release_is_measured_like_any_backbone(
    variant: str, backbone_folder: Path, light: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "R"
    arguments = [f"backbone.path={backbone_folder}", f"release.variant={variant}", f"output_dir={folder}"]
    assert run_main("+recipe=mini_release", *arguments) == 0
    run = tmp_path / "run"
    settings = [*light, f"backbone.path={folder}", f"output_dir={run}"]
    if variant == "release":
        assert run_main("+recipe=evaluate", *settings, "checkpoint=stock") == 0
        check_evaluation(run, ["stock"])
    else:  # on the same replay
        assert run_main("+recipe=compare", *settings, "checkpoints=[stock,stock]") == 0
        assert all(set(head["replay"]) == {"1", "2"} for head in read_json(run / "comparison.json")["heads"])


def test_a_random_miniature_needs_no_backbone(tmp_path: Path) -> None:
    settings = ["release.random=true", "backbone.shape.layer_types=[sliding]", f"output_dir={tmp_path}/R"]
    assert run_main("+recipe=mini_release", *settings) == 0
    assert len(list((tmp_path / "R").glob("model-*.safetensors"))) == 4


def test_a_release_with_dspark_blocks_is_explained_and_can_be_trained_on(
    backbone_folder: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "R"
    source = [f"backbone.path={backbone_folder}", "release.variant=dspark", f"output_dir={folder}"]
    assert run_main("+recipe=mini_release", *source) == 0
    settings = [*light, f"backbone.path={folder}", f"output_dir={tmp_path}/run", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *settings) == 2
    assert "DSpark blocks" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run_main("+recipe=distill", *settings, "mtp.init=backbone") == 0


def test_a_miniature_overwrites_nothing(
    backbone_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert run_main("+recipe=mini_release", f"backbone.path={backbone_folder}", f"output_dir={tmp_path}") == 2
    assert re.search(r"output_dir=.* is not empty; choose another folder", capfd.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_depth_grows_and_shrinks_and_the_checkpoint_records_it(
    distilled: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*light, "train.steps=1", "evaluate_at_end=false", "mtp.steps=3"]
    grown, shrunk = tmp_path / "grown", tmp_path / "shrunk"
    wide = ["mtp.mode=stacked", "mtp.depth=3", f"mtp.init={distilled}", f"output_dir={grown}"]
    assert run_main("+recipe=distill", *arguments, *wide) == 0
    assert run_main("+recipe=distill", *arguments, f"mtp.init={grown}", f"output_dir={shrunk}") == 0
    starts = [
        read_json(folder / "checkpoints" / "step_00000001" / "checkpoint.json")["identity"]["start"]
        for folder in (grown, shrunk)
    ]
    assert [start["modules"] for start in starts] == [1, 3]
    assert starts[0]["conversion"] == "modules 1..2 start as copies of module 0"
    assert starts[1]["conversion"] == "modules 0..0 of 3 were kept"
    assert f"mtp.init={grown}: modules 0..0 of 3 were kept" in capfd.readouterr().err


def test_training_against_the_encoding_is_recorded(light: list[str], release_folder: Path, tmp_path: Path) -> None:
    arguments = [*light, f"backbone.path={release_folder}", "mtp.quant_aware=true", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *arguments, f"output_dir={tmp_path}") == 0
    identity = read_json(tmp_path / "checkpoints" / "step_00000002" / "checkpoint.json")["identity"]
    assert identity["quant_aware"] == "fp8_fp4"
