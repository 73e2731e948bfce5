"""Runs in a local MLflow database, read back with MLflow's own client."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mtptrain.config import TrackingConfig
from mtptrain.errors import UserError
from mtptrain.run.trackers import TrackedRun
from mtptrain.run.tracking import MetricsLog, Trackers
from tests.command import read_metrics, run_main

pytest.importorskip("mlflow", reason="MLflow is not installed")
pytest.importorskip("sqlalchemy", reason="MLflow is installed without its database")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's server, and undo the variables that the tracker sets."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def open_trackers(folder: Path, settings: dict[str, Any] | None = None) -> Trackers:
    config = TrackingConfig(trackers={"mlflow": True}, project="heads", name="first", group="night", tags=["a"])
    return Trackers(TrackedRun(config, folder, settings or {"seed": 3}))


def read(folder: Path) -> tuple[Any, Any]:
    """Return the client of a folder's database, and its only run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("heads").experiment_id])
    return client, run


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    client, run = read(folder)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def train(folder: Path, start_step: int, steps: tuple[int, ...]) -> None:
    with open_trackers(folder) as trackers:
        log = MetricsLog(folder, trackers, start_step)
        for step in steps:
            log.write(step, {"loss/step_1": float(step)})
        log.close()
        trackers.table("evaluation/speedup", ["head", "median"], [("stock", 1.5 + start_step)])


def test_a_continued_run_is_one_run_with_every_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 0, (10, 20, 30))
    train(tmp_path, 20, (30, 40))
    assert "is off" not in capsys.readouterr().err
    _, run = read(tmp_path)
    assert (run.info.run_name, run.info.status, run.data.params) == ("first", "FINISHED", {"seed": "3"})
    assert (run.data.tags["group"], run.data.tags["a"]) == ("night", "true")
    assert curve(tmp_path, "loss/step_1") == [(step, float(step)) for step in (10, 20, 30, 40)]
    (table,) = tmp_path.glob("mlflow_artifacts/**/speedup.json")
    assert json.loads(table.read_text()) == {"columns": ["head", "median"], "data": [["stock", 21.5]]}
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "mlflow.db",
        "mlflow_run.json",
        "mlflow_artifacts",
    }


def test_a_job_that_fails_is_a_failed_run_with_more_settings_than_one_call_takes(tmp_path: Path) -> None:
    settings = {"train": {f"setting_{number}": number for number in range(205)}}
    with suppress(UserError), open_trackers(tmp_path, settings) as trackers:
        trackers.log(1, {"loss": 0.25})
        raise UserError("train.max_bad_steps=1: ...")
    _, run = read(tmp_path)
    assert run.info.status == "FAILED"
    assert len(run.data.params) == 205
    assert run.data.params["train.setting_7"] == "7"


def test_a_server_that_does_not_answer_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.25})
        trackers.log(2, {"loss": 0.25})
    assert capsys.readouterr().err.count("mlflow is off from step 1 on: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_distilled_head_sends_metrics_tables_report_and_checkpoints(light: list[str], tmp_path: Path) -> None:
    arguments = ["tracking=mlflow", "tracking.project=heads", "tracking.checkpoints=true", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    rows = [(row["step"], row["loss/step_1"]) for row in read_metrics(tmp_path) if "loss/step_1" in row]
    assert curve(tmp_path, "loss/step_1") == rows
    client, run = read(tmp_path)
    assert run.data.params["train.steps"] == "2"
    stored = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    names = ("acceptance_length.json", "acceptance_by_position.json", "speedup.json", "evaluation.json", "report.html")
    assert {f"evaluation/{name}" for name in (*names, "acceptance_length.svg")} <= stored
    files = client.list_artifacts(run.info.run_id, "checkpoints/step_00000002")
    assert "checkpoints/step_00000002/module.safetensors" in {file.path for file in files}


def test_a_process_beside_a_run_adds_to_it_and_does_not_end_it(tmp_path: Path) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.5})
        with Trackers(TrackedRun(TrackingConfig(trackers={"mlflow": True}), tmp_path, {}, beside=tmp_path)) as beside:
            beside.log(1, {"measured": 1.5})
        assert read(tmp_path)[1].info.status == "RUNNING"
        trackers.log(2, {"loss": 0.25})
    assert read(tmp_path)[1].info.status == "FINISHED"
    assert (curve(tmp_path, "measured"), curve(tmp_path, "loss")) == ([(1, 1.5)], [(1, 0.5), (2, 0.25)])
