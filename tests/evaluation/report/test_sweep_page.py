import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mtptrain.evaluation.report.sweep_page import print_sweep, short_label, write_sweep_page
from mtptrain.evaluation.sweep import JobOutcome, SweepJob, SweepResult, read_sweep, write_sweep
from tests.evaluation.recorded import EVALUATIONS, METRICS
from tests.evaluation.report.test_page import Page


def job(value: str, outcome: JobOutcome = JobOutcome.done, reason: str | None = None) -> SweepJob:
    return SweepJob(
        settings={"loss.divergence": value},
        folder=f"loss.divergence-{value}",
        outcome=outcome,
        exit_code=0 if reason is None else 2,
        reason=reason,
        seconds=12.5,
    )


@pytest.fixture
def sweep(tmp_path: Path) -> SweepResult:
    """Two jobs with an evaluation and a record, and one that failed."""
    failed = job("ce", JobOutcome.failed, "loss.divergence=ce: is <no> distillation")
    for name in ("kl", "tv"):
        folder = tmp_path / job(name).folder
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "metrics.jsonl").write_bytes(METRICS.read_bytes())
        values = json.loads(EVALUATIONS["greedy"].read_text(encoding="utf-8"))
        values["heads"][1]["replay"]["3"]["acceptance_length"] += 0.25 * (name == "tv")
        (folder / "evaluation.json").write_text(json.dumps(values), encoding="utf-8")
    values = {"schema": 1, "command": ["python"], "started": "now", "git_commit": None}
    return SweepResult(**values, jobs=[job("kl"), failed, job("tv")])


def printed(sweep: SweepResult, folder: Path) -> str:
    stream = io.StringIO()
    print_sweep(sweep, folder, Console(file=stream, width=80))
    return stream.getvalue()


def test_one_table_and_one_page_show_every_job(sweep: SweepResult, tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep.json", sweep)
    assert read_sweep(tmp_path / "sweep.json", "path") == sweep
    write_sweep_page(sweep, tmp_path, tmp_path / "sweep.html")
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    page = Page(text)
    best = json.loads((tmp_path / "loss.divergence-tv" / "evaluation.json").read_text())["heads"][1]["replay"]["3"]
    low, high = best["interval"]
    lead = "2 of 3 jobs done; loss.divergence=tv has the most tokens a pass"
    assert f"{lead}, {best['acceptance_length']:.2f} ({low:.2f} to {high:.2f}) at K=3" in text
    assert "FAILED" in text
    assert "loss.divergence=ce: loss.divergence=ce: is &lt;no&gt; distillation" in text
    assert text.count("<svg ") == 6
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    shown = printed(sweep, tmp_path)
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] in (["kl"], ["ce"], ["tv"])]
    assert [row[0] for row in rows] == ["kl", "ce", "tv"]
    assert [row[-1] for row in rows] == ["done", "FAILED", "done"]
    assert rows[1][1:-1] == ["-"] * 4
    assert f"checkpoints=[{tmp_path}/loss.divergence-kl,{tmp_path}/loss.divergence-tv]" in shown


def test_jobs_that_do_not_compare_have_no_best_one(sweep: SweepResult, tmp_path: Path) -> None:
    other = tmp_path / "loss.divergence-tv" / "evaluation.json"
    other.write_bytes(EVALUATIONS["sampled"].read_bytes())
    assert "2 of 3 jobs done\n" in printed(sweep, tmp_path)
    values = json.loads(EVALUATIONS["greedy"].read_text(encoding="utf-8"))
    values["certificate"]["passed"] = False
    other.write_text(json.dumps(values), encoding="utf-8")
    assert "2 of 3 jobs done\n" in printed(sweep, tmp_path)


def test_jobs_that_are_as_good_have_no_best_one(sweep: SweepResult, tmp_path: Path) -> None:
    for name in ("kl", "tv"):
        path = tmp_path / f"loss.divergence-{name}" / "evaluation.json"
        path.write_bytes(EVALUATIONS["greedy"].read_bytes())
    assert "2 of 3 jobs done\n" in printed(sweep, tmp_path)


def test_trained_backbones_are_not_to_be_compared_as_heads(sweep: SweepResult, tmp_path: Path) -> None:
    assert "loss: of the first draft step" in printed(sweep, tmp_path)
    for name in ("kl", "tv"):
        folder = tmp_path / f"loss.divergence-{name}"
        (folder / "evaluation.json").unlink()
        (folder / "config.yaml").write_text("task: backbone")
    text = printed(sweep, tmp_path)
    assert "+recipe=compare" not in text
    assert "tok/pass" not in text  # nor is a column explained that is not there


def test_the_rows_of_a_plot_name_the_only_setting_that_varies() -> None:
    assert short_label(job("kl").label) == "divergence=kl"
    assert short_label("train.learning_rate=0.004") == "learning_rate=0.004"
    assert short_label("train.learning_rate=0.004 seed=1") == "0.004 1"
    assert short_label("a.folder") == "a.folder"


@pytest.mark.parametrize(("varied", "expected"), [([], "[stock,[{0},{1}]]"), (["kl", "tv"], "[[{0},{1}],[{2},{3}]]")])
def test_seeds_are_compared_as_runs_of_one_setting(varied: list[str], expected: str, tmp_path: Path) -> None:
    settings = [{"loss.divergence": one} for one in varied] or [{}]
    every = [{**one, "seed": str(seed)} for one in settings for seed in (0, 1)]
    folders = ["+".join(f"{name}-{value}" for name, value in one.items()) for one in every]
    for folder in folders:
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_bytes(METRICS.read_bytes())
    jobs = [replace(job("kl"), settings=one, folder=folder) for one, folder in zip(every, folders, strict=True)]
    sweep = SweepResult(schema=1, command=["python"], started="now", git_commit=None, jobs=jobs)
    (command,) = [line for line in printed(sweep, tmp_path).splitlines() if "+recipe=compare" in line]
    assert command.startswith("run python -m mtptrain ")
    assert command.endswith("' for paired gains")  # none was measured, so none is the highest
    assert f"checkpoints={expected.format(*(tmp_path / folder for folder in folders))}" in command


def test_jobs_without_results_are_listed(sweep: SweepResult, tmp_path: Path) -> None:
    (tmp_path / "loss.divergence-kl" / "metrics.jsonl").write_text("{")
    (tmp_path / "loss.divergence-kl" / "evaluation.json").write_text("{")
    text = printed(sweep, tmp_path / "elsewhere")
    assert text.startswith("2 of 3 jobs done\n")
    assert "FAILED" in printed(sweep, tmp_path)
