"""Event files, read back with TensorBoard's own reader."""

import math
from pathlib import Path
from typing import Any

import pytest

from mtptrain.config import TrackingConfig
from mtptrain.run.trackers import TrackedRun
from mtptrain.run.tracking import MetricsLog, Trackers
from tests.command import read_metrics, run_main
from tests.light import certified

READERS = "tensorboard.backend.event_processing"
event_accumulator = pytest.importorskip(f"{READERS}.event_accumulator", reason="TensorBoard is not installed")
server_accumulator = pytest.importorskip(f"{READERS}.plugin_event_accumulator", reason="TensorBoard is not installed")


def open_trackers(folder: Path) -> Trackers:
    return Trackers(TrackedRun(TrackingConfig(trackers={"tensorboard": True}), folder, {"seed": 3}))


def read(folder: Path, reader: Any = event_accumulator) -> Any:
    return reader.EventAccumulator(str(folder / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read(folder).Scalars(name)]


def texts(folder: Path, name: str) -> list[str]:
    events = read(folder, server_accumulator).Tensors(f"{name}/text_summary")  # the other one purges no texts
    return [event.tensor_proto.string_val[0].decode() for event in events]


def train(folder: Path, start_step: int, steps: tuple[int, ...]) -> None:
    with open_trackers(folder) as trackers:
        log = MetricsLog(folder, trackers, start_step)
        for step in steps:
            log.write(step, {"loss/step_1": step + start_step / 100})
        log.close()
        trackers.table("evaluation/speedup", ["head", "median"], [("stock|a", 1.5)])


def test_curves_settings_and_tables_are_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 0, (10, 20))
    assert f"tensorboard --logdir {tmp_path}/tensorboard\n" in capfd.readouterr().err
    assert curve(tmp_path, "loss/step_1") == [(10, 10.0), (20, 20.0)]
    assert texts(tmp_path, "settings") == ["```yaml\nseed: 3\n```"]
    assert texts(tmp_path, "evaluation/speedup") == ["| head | median |\n| --- | --- |\n| stock\\|a | 1.5000 |"]


def test_a_figure_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": math.nan, "norm": math.inf})
    assert math.isnan(curve(tmp_path, "loss")[0][1])
    assert curve(tmp_path, "norm") == [(1, math.inf)]


def test_rows_and_tables_after_the_resumed_step_are_shown_once(tmp_path: Path) -> None:
    train(tmp_path, 0, (10, 20, 30))
    train(tmp_path, 20, (30, 40))
    assert curve(tmp_path, "loss/step_1") == [(10, 10), (20, 20), (30, pytest.approx(30.2)), (40, pytest.approx(40.2))]
    assert len(texts(tmp_path, "evaluation/speedup")) == 1
    assert len(texts(tmp_path, "settings")) == 1


def test_an_evaluation_without_training_keeps_the_curves(tmp_path: Path) -> None:
    train(tmp_path, 0, (10, 20))
    with open_trackers(tmp_path) as trackers:
        trackers.table("later", ["a"], [[1]])
    assert [step for step, _ in curve(tmp_path, "loss/step_1")] == [10, 20]
    assert texts(tmp_path, "later") == ["| a |\n| --- |\n| 1 |"]


def test_an_artifact_is_a_list_of_paths(tmp_path: Path) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.artifact("evaluation", "evaluation", [tmp_path / "report.html"], {"plot.svg": "<svg/>"})
    assert texts(tmp_path, "evaluation/files") == [f"- `{tmp_path / 'report.html'}`"]


def test_a_distilled_head_has_its_metrics_tables_and_files_listed(light: list[str], tmp_path: Path) -> None:
    arguments = ["tracking=tensorboard", "tracking.checkpoints=true", f"output_dir={tmp_path}"]
    with certified():
        assert run_main("+recipe=distill", *light, *arguments) == 0
    rows = [(row["step"], pytest.approx(row["loss/step_1"])) for row in read_metrics(tmp_path) if "loss/step_1" in row]
    assert curve(tmp_path, "loss/step_1") == rows
    names = {name.removesuffix("/text_summary") for name in read(tmp_path).Tags()["tensors"]}
    tables = {f"evaluation/{name}" for name in ("acceptance_length", "acceptance_by_position", "speedup")}
    assert names == {"settings", "checkpoints/files", "evaluation/files", *tables}
