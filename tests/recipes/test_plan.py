import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtptrain.evaluation.result import write_evaluation
from mtptrain.planning.result import read_plan, write_plan
from tests.command import ROOT, run_main
from tests.evaluation.recorded import recorded_evaluation


def make_plan(folder: Path, *arguments: str) -> dict:
    assert run_main(*arguments, "+recipe=plan", f"output_dir={folder}") == 0
    return json.loads((folder / "plan.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The plan of V4-Flash on 8 H200 with the defaults of the recipe."""
    return make_plan(tmp_path_factory.mktemp("flash"), "model=v4_flash", "hardware=h200")


def test_a_plan_has_every_k_from_0_to_8_and_its_sums_hold(flash: dict) -> None:
    rows = flash["draft_lengths"]
    assert [row["draft_length"] for row in rows] == list(range(9))
    for row in rows:
        cost = row["verify"]
        assert cost["seconds"] == pytest.approx(sum(part["seconds"] for part in cost["parts"].values()))
        spent = cost["seconds"] + (row["draft"] or {"seconds": 0.0})["seconds"]
        assert row["speedup"] == pytest.approx(row["acceptance_length"] * rows[0]["verify"]["seconds"] / spent)
    assert flash["best_draft_length"] == max(rows, key=lambda row: row["speedup"])["draft_length"]
    assert {"schema", "provenance", "what", "hardware", "load"} <= flash.keys()


@pytest.mark.parametrize("settings", [[], ["plan.what=training", "engine=zero2"]], ids=["decoding", "training"])
def test_the_file_of_a_plan_is_read_and_written_again_unchanged(settings: list[str], tmp_path: Path) -> None:
    make_plan(tmp_path, *settings)
    write_plan(tmp_path / "again.json", read_plan(tmp_path / "plan.json"))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


TIME = re.compile(r"\b(ms|seconds|hours|tokens/s)\b")


@pytest.mark.parametrize("settings", [["plan.what=decoding"], ["plan.what=training"]])
def test_every_printed_time_and_rate_is_called_a_ceiling(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_plan(tmp_path, *settings)
    timed = [line for line in capfd.readouterr().out.splitlines() if TIME.search(line)]
    assert timed
    assert [line for line in timed if "ceiling" not in line] == []


@pytest.mark.parametrize("model", ["tiny", "small", "v4_pro"])
@pytest.mark.parametrize("hardware", ["h100", "b200", "mi300x"])
def test_every_model_plans_on_every_hardware(model: str, hardware: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, f"model={model}", f"hardware={hardware}")
    assert plan["model"]["name"] == model
    assert plan["hardware"]["name"] == hardware


def test_better_acceptance_and_measured_ceilings_change_the_plan_as_they_must(flash: dict, tmp_path: Path) -> None:
    better = make_plan(tmp_path / "better", "plan.acceptance=[0.9]")
    slower = make_plan(tmp_path / "slower", "plan.measured=true")
    for old, kept, bounded in zip(
        flash["draft_lengths"], better["draft_lengths"], slower["draft_lengths"], strict=True
    ):
        assert kept["verify"]["seconds"] == old["verify"]["seconds"]
        assert kept["speedup"] >= old["speedup"]
        assert bounded["verify"]["seconds"] > old["verify"]["seconds"]


def test_more_gpus_are_faster_and_hold_less_each(flash: dict, tmp_path: Path) -> None:
    fewer = make_plan(tmp_path, "hardware.num_gpus=2")
    assert fewer["memory"]["weights_bytes_a_gpu"] == pytest.approx(4 * flash["memory"]["weights_bytes_a_gpu"])
    assert fewer["draft_lengths"][0]["verify"]["seconds"] > flash["draft_lengths"][0]["verify"]["seconds"]


def test_a_users_own_hardware_row_needs_only_a_file(tmp_path: Path) -> None:
    (tmp_path / "my" / "hardware").mkdir(parents=True)
    row = "name: desk\nmemory: 3.2e10\nbandwidth: 1.8e12\nfp8_flops: 4e14\nbf16_flops: 2e14\nfp32_flops: 1e14\n"
    (tmp_path / "my" / "hardware" / "desk.yaml").write_text(row)
    plan = make_plan(tmp_path / "run", "--config-dir", str(tmp_path / "my"), "hardware=desk", "model=small")
    assert plan["hardware"]["num_gpus"] == 1
    assert plan["memory"]["fits"]


def test_acceptance_is_read_from_an_evaluation(tmp_path: Path) -> None:
    evaluation = recorded_evaluation()
    stock, trained = evaluation.heads
    stock.replay[3].conditional[:] = [0.5, 0.25, None]
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    plan = make_plan(tmp_path / "last", f"plan.evaluation={tmp_path}")
    assert plan["acceptance"]["conditional"] == trained.replay[3].conditional
    plan = make_plan(tmp_path / "named", f"plan.evaluation={tmp_path}/evaluation.json", "plan.head=stock")
    assert plan["acceptance"]["conditional"] == [0.5, 0.25, 0.0]  # a position never reached counts as never kept


def test_a_training_plan_reads_the_settings_of_the_training_itself(tmp_path: Path) -> None:
    settings = [
        "engine=zero2",
        "offload=true",
        "backbone.placement=zero3",
        "train.batch_size=16",
        "data.sequence_length=2048",
        "train.steps=1000",
        "train.recompute=true",
        "mtp.trainable=no_experts",
        "data=streams",
    ]
    plan = make_plan(tmp_path, "plan.what=training", "plan.weights=bf16", *settings)
    load = plan["training"]
    assert (load["train_experts"], load["recompute"], load["from_streams"]) == (False, True, True)
    assert (load["zero_stage"], load["placement"], load["rows"], load["row_length"]) == (2, "zero3", 2, 2048)
    assert plan["memory"]["cpu"].keys() > {"heads' fp32 masters", "optimiser state"}
    seconds = plan["step"]["seconds"]
    assert plan["step"]["tokens"] == 16 * 2048
    assert plan["memory"]["bytes_a_gpu"] == pytest.approx(sum(plan["memory"]["gpu"].values()))
    assert plan["tokens_per_second"] == pytest.approx(16 * 2048 / (seconds["computing"] + seconds["communication"]))
    assert plan["expected_hours"] > plan["hours"]
    assert plan["tokens"] == 1000 * 16 * 2048
    assert plan["hours"] == pytest.approx(plan["tokens"] / plan["tokens_per_second"] / 3600)
    assert plan["stream_cache"]["bytes"] == plan["tokens"] * 32 * 1024


@pytest.mark.parametrize(
    ("recipe", "processes", "from_streams"),
    [("flash_1node", 8, False), ("flash_2nodes", 16, True), ("pro_cluster", 64, True)],
)
def test_a_recipe_for_a_cluster_plans_itself_and_fits(
    recipe: str, processes: int, from_streams: bool, tmp_path: Path
) -> None:
    assert run_main(f"+recipe={recipe}", "task=plan", f"output_dir={tmp_path}") == 0
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["memory"]["fits"]
    assert (plan["training"]["num_gpus"], plan["training"]["from_streams"]) == (processes, from_streams)


def test_training_on_one_gpu_sends_nothing(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "plan.what=training", "model=tiny", "hardware.num_gpus=1", "precision=fp32")
    assert plan["step"]["sent_bytes_a_gpu"] == {}
    assert plan["step"]["seconds"]["communication"] == 0


MISTAKES = [
    (
        ["model=huge"],
        r"\+model=huge: there is no such choice of model; there are small, tiny, tiny12, v4_flash, v4_pro$",
    ),
    (["model.shape.num_experts=0"], "backbone.shape.num_experts=0: must be at least 1"),
    (["plan.acceptance=[0.8,1.2]"], r"plan.acceptance=\[0.8,1.2\]: every share must lie in \[0, 1\]"),
    (["plan.acceptance=[nan]"], r"plan.acceptance=\[nan\]: every share must lie"),
    (["plan.acceptance=[]"], "plan.acceptance=.*at least one share; give"),
    (["plan.batch=0"], "plan.batch=0: must be at least 1"),
    (["plan.context=0"], "plan.context=0: must be at least 1"),
    (["hardware.bandwidth=0"], "hardware.bandwidth=0.0: must be above 0"),
    (["hardware.interconnect=0"], "hardware.interconnect=0.0: must be above 0 with more than one GPU"),
    (["hardware.efficiency=1.5"], r"hardware.efficiency=1.5: must lie in \(0, 1\]"),
    (["+hardware.bandwith=1"], "hardware.bandwith: there is no such setting"),
    (["hardware=h100", "plan.measured=true"], "plan.measured=true: hardware=h100 has no measured ceilings"),
    (["plan.evaluation=/absent"], "plan.evaluation=/absent: cannot be read .*give an evaluation.json"),
    (["plan.what=training", "mtp.trainable=*.e_proj.*"], r"mtp.trainable=\*.e_proj.\*: .*set all or no_experts"),
    (
        ["plan.what=training", "train.batch_size=12"],
        "train.batch_size=12: .*hardware.num_gpus=8.*set train.batch_size=8",
    ),
    (["plan.what=training", "backbone.placement=auto"], "backbone.placement=auto: .*set replicate, zero3 or"),
    *[
        (
            ["plan.what=training", "hardware.num_gpus=3", "train.batch_size=3", f"{setting}=expert_parallel"],
            f"{setting}=expert_parallel: hardware.num_gpus=3 does not divide the 256 experts",
        )
        for setting in ("backbone.placement", "mtp.experts")
    ],
    (["plan.weights=int4"], "plan.weights=int4: must be release, fp8, bf16 or fp32"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_wrong_setting_of_a_plan_is_named(
    arguments: list[str], line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("+recipe=plan", f"output_dir={tmp_path}/run", *arguments) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert re.match(rf"mtptrain: .*{line}", errors)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", '{"heads": []}', '{"heads": [{"name": "a"}]}'])
def test_a_file_that_is_no_evaluation_is_named(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    assert run_main("+recipe=plan", f"plan.evaluation={tmp_path}", f"output_dir={tmp_path}/run") == 2
    assert re.match(r"mtptrain: plan.evaluation=.*: is no evaluation.json .*wrote\n", capfd.readouterr().err)


def test_a_plan_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['mtptrain', '+recipe=plan']; from mtptrain.cli import main; main(); "
        "sys.exit(len({'torch', 'transformers'} & sys.modules.keys()))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "best: K=" in ended.stdout
