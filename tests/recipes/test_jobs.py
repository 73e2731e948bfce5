"""Jobs around a recipe: a sweep, a recipe of the user's own, and what is tracked."""

from pathlib import Path

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


def test_tracking_none_writes_no_metrics(light: list[str], tmp_path: Path) -> None:
    arguments = ["tracking=none", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "provenance.json"]
