import json
import math
from pathlib import Path
from typing import Any

import pytest

from mtptrain.run.tracking import METRICS_FILE, MetricsLog, Trackers
from tests.command import run_main


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def open_log(folder: Path, start_step: int = 0) -> MetricsLog:
    return MetricsLog(folder, Trackers(), start_step)


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": 0.5 * step})
        assert rows(tmp_path)[-1] == {"step": step, "loss": 0.5 * step}  # the log is still open
    log.close()


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(1, {"loss": math.nan, "gradient_norm": math.inf, "tokens": 5})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "tokens": 5}]


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    for step in (10, 20, 30):
        first.write(step, {"loss": 1.0})
    first.close()
    resumed = open_log(tmp_path, start_step=20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    resumed.write(30, {"loss": 2.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]


@pytest.mark.parametrize("torn", ["", "{", '{"step": 1', '{"step": 10, "loss": 1.0', '{"step": 10, "loss": 1.0}\n{"st'])
def test_a_torn_line_is_dropped(torn: str, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 5}\n' + torn, encoding="utf-8")
    log = open_log(tmp_path, start_step=10)
    log.write(20, {})
    log.close()
    whole = [{"step": 10, "loss": 1.0}] if "}" in torn else []
    assert rows(tmp_path) == [{"step": 5}, *whole, {"step": 20}]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None, Trackers())
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_ends_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    log = MetricsLog.__new__(MetricsLog)
    log.file, log.trackers = (tmp_path / METRICS_FILE).open("a"), Trackers()
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("metrics.jsonl ends before step 1: No space left on device") == 1


def test_a_log_that_cannot_be_written_warns_once_and_training_goes_on(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METRICS_FILE).mkdir()  # a folder where the file should be
    arguments = ["resume=auto", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()
    assert capfd.readouterr().err.count(f"{METRICS_FILE}: cannot be written (Is a directory)") == 1
