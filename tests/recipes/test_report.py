import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtptrain.evaluation.curve import CURVE_SCHEMA, Curve, CurveIdentity, CurvePoint, write_curve
from mtptrain.evaluation.result import SCHEMA
from tests.command import ROOT, hold_folder, run_main
from tests.evaluation.recorded import EVALUATIONS, FOLDER, LAST_STEP, METRICS, recorded_evaluation
from tests.light import sketching

MEASURED = recorded_evaluation().last_head.replay[3]
HEADLINE = f"trained head: {MEASURED.acceptance_length:.2f} tokens a pass at K=3 ("


def stored_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_bytes(EVALUATIONS["greedy"].read_bytes())
    (folder / "config.yaml").write_text("task: evaluate\n")
    return folder


@pytest.fixture
def sketched() -> Iterator[None]:
    with sketching():
        yield


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of a command that must fail."""
    assert run_main("+recipe=report", *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    return line.removeprefix("mtptrain: ")


@pytest.mark.parametrize("name", ["", "evaluation.json"], ids=["folder", "file"])
def test_an_old_run_gets_its_report_again_and_nothing_else(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = stored_run(tmp_path / "run")
    assert run_main("+recipe=report", f"path={run / name}") == 0
    output, errors = capfd.readouterr()
    assert HEADLINE in output
    assert errors == f"wrote {run / 'report.html'}\n"
    assert "<style>" in (run / "report.html").read_text(encoding="utf-8")
    assert sorted(os.listdir(run)) == ["config.yaml", "evaluation.json", "report.html"]
    assert os.listdir(tmp_path) == ["run"]
    assert (run / "config.yaml").read_text() == "task: evaluate\n"


@pytest.mark.usefixtures("sketched")
def test_a_report_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, other = stored_run(tmp_path / "run"), tmp_path / "other"
    (run / "report.html").write_text("mine")
    line = refusal(capfd, f"path={run}")
    assert line.startswith(f"path={run}: {run / 'report.html'} exists; set output_dir to another")
    assert run_main("+recipe=report", f"path={run}", f"output_dir={other}") == 0
    capfd.readouterr()
    assert refusal(capfd, f"path={run}", f"output_dir={other}").startswith(f"output_dir={other}: {other / 'report'}")
    assert (run / "report.html").read_text() == "mine"
    assert os.listdir(other) == ["report.html"]
    assert run_main("+recipe=report", f"path={run}", "overwrite=true") == 0
    assert (run / "report.html").read_text() != "mine"


def test_a_report_waits_for_a_run_that_writes_its_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = stored_run(tmp_path / "run")
    process = hold_folder(run)
    try:
        assert refusal(capfd, f"path={run}").startswith(f"path={run}: process {process.pid} on ")
    finally:
        process.communicate()
    assert not (run / "report.html").exists()


def test_a_training_has_a_report_while_it_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(METRICS.read_bytes())
    (run / "config.yaml").write_text("task: distill\ntrain: {steps: 900}\n")
    process = hold_folder(run)
    try:
        assert run_main("+recipe=report", f"path={run}") == 0
        output = capfd.readouterr().out
    finally:
        process.communicate()
    assert output.startswith(f"step {LAST_STEP} of 900; loss ")
    assert "the training goes on" in output
    assert "Acceptance length by replay" in (run / "report.html").read_text(encoding="utf-8")
    assert refusal(capfd, f"path={run}").startswith(f"path={run}: {run / 'report.html'} exists")
    with sketching():
        assert run_main("+recipe=report", f"path={run}", "overwrite=true") == 0
    assert "not finished; continue with" in capfd.readouterr().out
    (run / "metrics.jsonl").write_text("{")
    assert refusal(capfd, f"path={run}").startswith(f"path={run / 'metrics.jsonl'}: holds no row yet")


@pytest.mark.parametrize("name", ["comparison.json", "another.json"])
def test_a_comparison_is_drawn_again(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes((FOLDER / "data" / "comparison.json").read_bytes())
    path = tmp_path / name if name == "another.json" else tmp_path
    assert run_main("+recipe=report", f"path={path}") == 0
    assert "Acceptance length and gain by domain" in capfd.readouterr().out
    assert sorted(os.listdir(tmp_path)) == sorted([name, "comparison.html"])
    (tmp_path / name).write_text('{"comparisons": [], "schema": 1}')
    assert "is no comparison.json of schema" in refusal(capfd, f"path={path}")


def small_curve() -> Curve:
    """A curve with one checkpoint, of the figures of a recorded evaluation."""
    recorded, head = recorded_evaluation(), recorded_evaluation().last_head
    longest = recorded.draft_length
    identity = CurveIdentity(
        run="run",
        backbone=recorded.backbone.fingerprint,
        dtype="float32",
        prompts=["heldout"],
        traces=None,
        num_prompts=4,
        prompt_tokens=32,
        draft_length=longest,
        policy=recorded.policy,
    )
    point = CurvePoint(
        step=2,
        tokens=64,
        checkpoint="run/checkpoints/step_00000002",
        digest="",
        replay={k: head.replay[k] for k in range(1, longest + 1)},
        gain=None,
        seen_prompts=None,
        chosen_on=None,
    )
    return Curve(
        schema=CURVE_SCHEMA,
        provenance=recorded.provenance,
        identity=identity,
        backbone=recorded.backbone,
        prompts=recorded.prompts,
        stock=None,
        best_step=None,
        points=[point],
        skipped=[],
    )


@pytest.mark.parametrize("name", ["curve.json", "another.json"])
def test_a_curve_is_drawn_again(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_curve(tmp_path / name, small_curve())
    path = tmp_path / name if name == "another.json" else tmp_path
    assert run_main("+recipe=report", f"path={path}") == 0
    assert "Acceptance length by checkpoint" in capfd.readouterr().out
    assert sorted(os.listdir(tmp_path)) == sorted([name, "curve.html"])
    (tmp_path / name).write_text('{"points": [], "schema": 0}')
    assert "is no curve.json of schema" in refusal(capfd, f"path={path}")


def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert refusal(capfd).startswith("path=null: report needs an evaluation.json or the folder of its run")
    assert refusal(capfd, f"path={tmp_path}/absent").startswith(f"path={tmp_path}/absent: cannot be read (No such file")
    assert refusal(capfd, f"path={tmp_path}").startswith(f"path={tmp_path}: holds no evaluation.json, curve.json, ")
    older = tmp_path / "evaluation.json"
    older.write_text(json.dumps({"schema": SCHEMA - 1}))
    line = refusal(capfd, f"path={older}")
    assert line.startswith(f"path={older}: is no evaluation.json of schema {SCHEMA} (schema: expected {SCHEMA}, got ")
    assert os.listdir(tmp_path) == ["evaluation.json"]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = stored_run(tmp_path / "run")
    monkeypatch.setattr("mtptrain.recipes.report.write_report", refuse)  # rights do not bind a superuser
    line = refusal(capfd, f"path={run}")
    assert line == f"path={run}: {run / 'report.html'} cannot be written (Permission denied); set output_dir to a " + (
        "folder of yours"
    )


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.argv = ['mtptrain', '+recipe=report', 'path={stored_run(tmp_path / 'run')}']; "
        "from mtptrain.cli import main; main(); sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (shown.returncode, HEADLINE in shown.stdout) == (0, True), shown.stderr
