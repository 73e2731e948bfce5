"""Rows, tables and artifacts sent to W&B, read back from the record of offline runs."""

import json
from contextlib import suppress
from glob import glob
from pathlib import Path

import pytest
from wandb import Settings

from mtptrain.config import RunConfig, TrackingConfig
from mtptrain.errors import UserError
from mtptrain.run.folder import open_run_folder
from mtptrain.run.storage import write_json
from mtptrain.run.trackers import TrackedRun
from mtptrain.run.tracking import MetricsLog, Trackers
from tests.command import read_metrics, run_main
from tests.light import certified
from tests.run.offline_run import artifacts, history, records


@pytest.fixture(autouse=True)
def without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def open_trackers(folder: Path) -> Trackers:
    config = TrackingConfig(trackers={"wandb": True}, project="heads", name="first", group="night", tags=["a", "b"])
    return Trackers(TrackedRun(config, folder, {"seed": 3}))


def open_beside(run: Path, own: Path) -> Trackers:
    """The trackers of a process with a folder of its own, which writes into a run."""
    return Trackers(TrackedRun(TrackingConfig(trackers={"wandb": True}), run, {}, beside=own))


def test_a_run_carries_its_names_and_configuration(tmp_path: Path) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.25})
    (run,) = [record.run for record in records(tmp_path) if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("heads", "first", "night", ["a", "b"])
    assert {item.key: item.value_json for item in run.config.update}["seed"] == "3"


def test_a_continued_run_keeps_its_id(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_trackers(tmp_path) as trackers:
            trackers.log(step, {"loss": 0.25 * step})
    sent_records = records(tmp_path)
    runs = [record.run for record in sent_records if record.HasField("run")]
    assert len(runs) == 2
    assert runs[0].run_id == runs[1].run_id
    assert [row["loss"] for row in history(sent_records)] == [0.25, 0.5]


def test_rows_after_the_resumed_step_are_sent_once(tmp_path: Path) -> None:
    for start, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        with open_trackers(tmp_path) as trackers:
            log = MetricsLog(tmp_path, trackers, start)
            for step in steps:
                log.write(step, {"loss": float(step)})
            log.close()
    assert [row["loss"] for row in history(records(tmp_path))] == [10, 20, 30, 40]


def test_a_killed_run_is_sent_from_the_resumed_step_on(tmp_path: Path) -> None:
    """A killed process may have lost its last rows, so they are sent again: twice is better than never."""
    write_json(tmp_path / "wandb_run.json", {"id": "killed"})
    with open_trackers(tmp_path) as trackers:
        MetricsLog(tmp_path, trackers, 20).write(30, {"loss": 31.0})
    sent_records = records(tmp_path)
    assert [row["loss"] for row in history(sent_records)] == [31]
    assert {record.run.run_id for record in sent_records if record.HasField("run")} == {"killed"}


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_resumed_run_loses_no_row_whose_step_was_passed_before(was_killed: bool, tmp_path: Path) -> None:
    """W&B ignores rows whose number is not above all earlier ones; the interrupted process got as far as step 30."""
    with open_trackers(tmp_path) as trackers:
        log = MetricsLog(tmp_path, trackers, 0)
        for step in (10, 20, 30):
            log.write(step, {"loss": float(step)})
        log.close()
    if was_killed:
        write_json(tmp_path / "wandb_run.json", {"id": json.loads((tmp_path / "wandb_run.json").read_text())["id"]})
    with open_trackers(tmp_path) as trackers:
        log = MetricsLog(tmp_path, trackers, 10)
        for step in (20, 30):
            log.write(step, {"loss": step + 0.5, "replay": float(step)})
        log.write(40, {"loss": 40.0})
        trackers.table("evaluation", ["x"], [[1]])
        log.close()
    with open_trackers(tmp_path) as trackers:  # a finished run measures again
        trackers.table("again", ["x"], [[1]])
    rows = history(records(tmp_path))
    sent = [(row["step"], row[name]) for name in ("loss", "replay") for row in rows if name in row]
    again = [(20, 20.5), (30, 30.5)] if was_killed else []
    assert sent == [(10, 10), (20, 20), (30, 30), *again, (40, 40), (20, 20), (30, 30)]
    assert {"evaluation/_type", "again/_type"} <= {name for row in rows for name in row}
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))


def test_the_training_step_is_the_axis_of_every_metric(tmp_path: Path) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(7, {"loss": 0.25})
    metrics = [record.metric for record in records(tmp_path) if record.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]


def test_nothing_is_written_before_something_is_sent(tmp_path: Path) -> None:
    with open_trackers(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_offline_run_prints_the_command_that_uploads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.25})
    *_, pattern = capsys.readouterr().err.splitlines()[-1].split()
    assert glob(pattern) == [str(folder) for folder in tmp_path.glob("wandb/offline-run-*")]


def test_a_job_that_fails_is_a_failed_run(tmp_path: Path) -> None:
    with suppress(UserError), open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.25})
        raise UserError("train.max_bad_steps=1: ...")
    assert [record.exit.exit_code for record in records(tmp_path) if record.HasField("exit")] == [1]


def test_of_several_processes_the_first_alone_has_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(task="distill", output_dir=str(tmp_path), tracking=TrackingConfig(trackers={"wandb": True}))
    monkeypatch.setenv("RANK", "1")
    with open_run_folder(config, {}).open_trackers() as trackers:
        trackers.log(1, {"loss": 0.25})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_nothing(
    light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb").write_text("a file where the folder should be")
    arguments = ["tracking=wandb", "evaluate_at_end=false", f"output_dir={run}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert capfd.readouterr().err.count("wandb is off from step 1 on") == 1


def test_a_run_that_breaks_warns_once_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_trackers(tmp_path) as trackers:
        trackers.log(1, {"loss": 0.25})
        trackers.table("broken", ["one column"], [[1, 2, 3]])
        trackers.log(2, {"loss": 0.5})
    assert capsys.readouterr().err.count("wandb is off before the table broken") == 1


def test_a_distilled_head_sends_metrics_tables_report_and_checkpoints(light: list[str], tmp_path: Path) -> None:
    arguments = ["tracking=wandb", "tracking.checkpoints=true", "evaluation.every=1", f"output_dir={tmp_path}"]
    with certified():
        assert run_main("+recipe=distill", *light, "mtp.steps=3", *arguments) == 0
    sent_records = records(tmp_path)
    rows = history(sent_records)
    sent = {name for row in rows for name in row}
    assert {f"{name}/step_{k}" for name in ("loss", "alpha", "top1_match") for k in (1, 2, 3)} <= sent
    assert {"gradient_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"} <= sent
    assert {"replay/acceptance_length_2", "experts/largest_load_0"} <= sent
    tables = {name.split("/_type")[0] for name in sent if name.endswith("/_type")}
    assert {f"evaluation/{name}" for name in ("acceptance_length", "acceptance_by_position", "speedup")} <= tables
    logged = [row["loss/step_1"] for row in rows if "loss/step_1" in row]
    assert logged == [row["loss/step_1"] for row in read_metrics(tmp_path) if "loss/step_1" in row]
    stored = artifacts(sent_records)
    assert {"evaluation.json", "report.html", "acceptance_length.svg", "losses.svg"} <= set(stored["evaluation"])
    assert {"step_00000002/module.safetensors", "best/module.safetensors"} <= set(stored["model"])


def test_a_process_beside_a_run_writes_into_it_and_leaves_its_record_alone(tmp_path: Path) -> None:
    """Its rows have numbers above those of the run, which may go on and sends them first."""
    run, own = tmp_path / "run", tmp_path / "watch"
    own.mkdir()
    with open_trackers(run) as trackers:
        trackers.log(10, {"loss": 0.5})
    with open_beside(run, own) as beside:
        beside.log(10, {"measured": 1.5})
    with open_trackers(run) as trackers:
        trackers.log(20, {"loss": 0.25})
    kept = json.loads((run / "wandb_run.json").read_text(encoding="utf-8"))
    main, other = records(run), records(own)
    assert {one.run.run_id for one in (*main, *other) if one.HasField("run")} == {kept["id"]}
    assert kept["sent_steps"] == {"loss": 20}
    assert [(row["step"], row["measured"]) for row in history(other)] == [(10, 1.5)]
    assert min(row["_step"] for row in history(other)) > max(row["_step"] for row in history(main))


def test_a_process_beside_a_run_that_has_sent_nothing_gives_it_its_id(tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "watch"
    own.mkdir()
    run.mkdir()
    with open_beside(run, own) as beside:
        beside.log(1, {"measured": 1.5})
    with open_trackers(run) as trackers:
        trackers.log(2, {"loss": 0.25})
    runs = [record.run.run_id for record in (*records(run), *records(own)) if record.HasField("run")]
    assert len(runs) == 2
    assert len(set(runs)) == 1


class FakeRun:
    """The arguments with which W&B was started, and the rows that it got."""

    step = 0

    def __init__(self, settings: Settings, **arguments: object) -> None:
        self.id, self.mode, self.label, self.primary = (
            arguments["id"],
            arguments["mode"],
            settings.x_label,
            settings.x_primary,
        )
        self.rows: list[object] = []

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, values: object, **numbered: object) -> None:
        self.rows.append((values, numbered))

    def finish(self, exit_code: int) -> None: ...


def test_a_watch_joins_an_online_run_that_began_in_shared_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[FakeRun] = []
    monkeypatch.setenv("WANDB_MODE", "shared")
    monkeypatch.setattr("wandb.init", lambda **arguments: begun.append(FakeRun(**arguments)) or begun[-1])
    run, own = tmp_path / "run", tmp_path / "watch"
    own.mkdir()
    with open_trackers(run) as trackers:
        trackers.log(10, {"loss": 0.5})
    with open_beside(run, own) as beside:
        beside.log(5, {"measured": 1.5})
    training, watch = begun
    assert [(one.mode, one.label, one.primary) for one in begun] == [
        ("shared", "training", True),
        ("shared", "watch", False),
    ]
    assert watch.id == training.id
    assert training.rows == [({"step": 10, "loss": 0.5}, {})]  # the server numbers the rows
    assert watch.rows == [({"step": 5, "measured": 1.5}, {})]


def test_a_watch_of_an_online_run_that_is_not_shared_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of a second process would replace the first rows of the training: wandb/wandb#12269."""
    run, own = tmp_path / "run", tmp_path / "watch"
    own.mkdir()
    run.mkdir()
    write_json(run / "wandb_run.json", {"id": "training"})
    monkeypatch.setenv("WANDB_MODE", "online")
    with open_beside(run, own) as beside:
        beside.log(5, {"measured": 1.5})
    written = records(own)
    assert {one.run.run_id for one in written if one.HasField("run")} == {"training"}
    assert [row["measured"] for row in history(written)] == [1.5]
    errors = capsys.readouterr().err
    assert "did not begin with WANDB_MODE=shared; these rows are kept offline" in errors
    assert "wandb sync" in errors
