import json
import math
from pathlib import Path

from mtptrain.run.record import read_record
from mtptrain.run.tracking import read_rows


def write(folder: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_rows_that_a_resumed_run_wrote_again_replace_the_earlier_ones(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in (10, 20, 30)]
    probe = {"step": 20, "replay/acceptance_length_4": 2.0}
    write(tmp_path, *rows, probe | {"step": 30}, {"step": 20, "loss": 7.0}, probe, {"step": 40, "loss": 8.0})
    record = read_record(tmp_path)
    assert record is not None
    loss, replay = record.curves["loss"], record.curves["replay/acceptance_length_4"]
    assert (loss.steps, loss.values) == ([10, 20, 40], [10.0, 7.0, 8.0])
    assert replay.steps == [20]
    assert record.last_step == 40


def test_lines_that_are_no_rows_are_left_out_and_null_is_a_gap(tmp_path: Path) -> None:
    write(tmp_path, "{", "[1]", "\x00", {"step": "x", "loss": 1.0}, {"step": 1, "loss": 1.0, "note": "a"})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "loss": null, "never": null}\n\xff\xfe\n{"step": 3, "lo')
    record = read_record(tmp_path)
    assert record is not None
    assert set(record.curves) == {"loss"}
    assert record.curves["loss"].steps == [1, 2]
    assert math.isnan(record.curves["loss"].values[1])
    assert record.curves["loss"].last == 1.0
    assert read_record(write(tmp_path, "{")) is None
    assert read_record(tmp_path / "missing") is None
    assert list(read_rows(tmp_path / "missing" / "metrics.jsonl")) == []


def test_a_record_knows_how_far_its_training_is(tmp_path: Path) -> None:
    write(tmp_path, {"step": 10, "loss": 1.0})
    (tmp_path / "config.yaml").write_text("task: distill\ntrain: {steps: 20}\n")
    record = read_record(tmp_path)
    assert record is not None
    assert (record.task, record.num_steps, record.is_finished, record.is_running) == ("distill", 20, False, False)
    for damaged in ("train: [", "- 1", "train: 5"):
        (tmp_path / "config.yaml").write_text(damaged)
        unknown = read_record(tmp_path)
        assert unknown is not None
        assert unknown.num_steps is None
