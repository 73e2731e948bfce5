"""Jobs around a recipe: a sweep, a recipe of the user's own, and what is tracked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import run_main
from tests.recipes.test_recipes import check_training


def test_a_sweep_gives_each_job_a_folder_and_ends_with_one_table_and_page(
    light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sweep = tmp_path / "sweep"
    arguments = ["-m", "+recipe=distill", "loss.divergence=kl,ce,tv", "evaluate_at_end=false", f"output_dir={sweep}"]
    assert run_main(*arguments, *light) == 2  # of the job with the loss that distillation refuses
    jobs = {name: f"loss.divergence-{name}" for name in ("kl", "tv")}
    assert sorted(path.name for path in sweep.iterdir()) == [
        *jobs.values(),
        *("multirun.yaml", "sweep.html", "sweep.json"),
    ]
    assert list(Path.cwd().iterdir()) == []
    for divergence, job in jobs.items():
        check_training(sweep / job)
        settings = yaml.safe_load((sweep / job / "config.yaml").read_text(encoding="utf-8"))
        assert settings["loss"]["divergence"] == divergence
    table = capfd.readouterr().out
    assert table.startswith("2 of 3 jobs done\n")
    assert "loss.divergence=ce: loss.divergence=ce: is training on data tokens" in table
    assert run_main("+recipe=report", f"path={sweep}", "overwrite=true") == 0
    assert capfd.readouterr().out == table


def sweep_jobs(folder: Path) -> list[dict[str, Any]]:
    jobs = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["jobs"]
    assert isinstance(jobs, list)
    return jobs


def test_a_sweep_replaces_no_other_sweep_but_adds_to_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    plans = ["-m", "+recipe=plan", f"output_dir={sweep}"]
    assert run_main(*plans, "plan.batch=1,2") == 0
    before = sweep_jobs(sweep)
    capfd.readouterr()
    assert run_main(*plans, "plan.batch=4") == 2
    assert capfd.readouterr().err == (
        f"mtptrain: output_dir={sweep}: already holds sweep.json; choose another folder, add to its jobs with "
        "resume=auto, or set overwrite=true to replace it\n"
    )
    assert sweep_jobs(sweep) == before
    assert run_main(*plans, "plan.batch=2,4", "resume=auto") == 2  # of the plan that is there already
    assert [(job["settings"]["plan.batch"], job["outcome"]) for job in sweep_jobs(sweep)] == [
        *(("1", "done"), ("2", "failed"), ("4", "done"))
    ]
    assert run_main(*plans, "plan.batch=4,8", "overwrite=true") == 0
    assert [job["settings"]["plan.batch"] for job in sweep_jobs(sweep)] == ["4", "8"]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("plan plan.batch=1,2 checkpoint=stock", "checkpoint=stock: belongs to +recipe=doctor, evaluate, "),
        ("evaluate checkpoint=stock train.steps=1,2", "train.steps=1: belongs to +recipe="),
        ("generate prompt=a,b train.steps=1 overwrite=true", "train.steps=1: belongs to +recipe="),
    ],
)
def test_a_setting_that_no_job_reads_ends_a_sweep_before_the_first(
    command: str, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("-m", *command.split(), f"output_dir={tmp_path / 'sweep'}") == 2
    output, errors = capfd.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert errors.startswith(f"mtptrain: {line}")


def test_a_setting_that_one_job_reads_is_noted_in_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan.what=decoding,training", "plan.batch=2", f"output_dir={tmp_path / 'sweep'}"]
    assert run_main("-m", "plan", *arguments) == 0
    assert capfd.readouterr().err.count("note: +recipe=plan does not read plan.batch=2 with these settings\n") == 1


def test_the_help_of_a_sweep_is_printed_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("-m", "plan", "plan.batch=1,2", f"output_dir={tmp_path / 'sweep'}", "--help") == 0
    output, errors = capfd.readouterr()
    assert (output.count("plan.batch=1 "), output.count("plan.batch="), errors) == (1, 1, "")
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_recipe_is_found(light: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "my" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\ntask: distill\nmtp: {steps: 2}\nloss: {divergence: tv}\n", encoding="utf-8")
    arguments = ["--config-dir", str(tmp_path / "my"), "+recipe=mine", "evaluate_at_end=false"]
    assert run_main(*arguments, *light, f"output_dir={tmp_path / 'run'}") == 0
    check_training(tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (settings["mtp"]["steps"], settings["loss"]["divergence"]) == (2, "tv")


def test_wandb_records_offline_without_a_key(light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    arguments = ["tracking=wandb", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    check_training(tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_tracking_none_writes_the_checkpoint_alone_and_says_where(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tracking=none", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "provenance.json"]
    last = tmp_path / "checkpoints" / "step_00000002"
    (backbone,) = (word for word in light if word.startswith("backbone.path="))
    way_on = f"measure it with +recipe=evaluate {backbone} checkpoint={tmp_path}"
    assert capfd.readouterr().err.endswith(f"\nwrote {last}; {way_on}\n")
