"""Rules for every tracker, tested with one that raises."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mtptrain.config import TrackingConfig
from mtptrain.errors import UserError
from mtptrain.run import trackers as package
from mtptrain.run.trackers import TrackedRun, check_trackers, known_trackers
from mtptrain.run.tracking import MetricsLog, Trackers
from tests.command import ROOT, Refused, read_metrics, run_main

METHODS = ("begin", "log", "table", "artifact", "finish")


class FakeTracker:
    """Records its calls, and raises in one of them."""

    def __init__(self, broken: str, error: BaseException) -> None:
        self.broken, self.error = broken, error
        self.calls: list[str] = []

    def begin(self, run: TrackedRun) -> "FakeTracker":
        self._call("begin")
        return self

    def log(self, *_: Any) -> None:
        self._call("log")

    def table(self, *_: Any) -> None:
        self._call("table")

    def artifact(self, *_: Any) -> None:
        self._call("artifact")

    def finish(self, failed: bool) -> None:
        self._call("finish")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise self.error


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, FakeTracker]]:
    """Fake modules of trackers by name, which replace the real ones."""
    modules: dict[str, FakeTracker] = {}
    monkeypatch.setattr(package, "import_module", lambda name: modules[name.rpartition(".")[2]])
    return modules


def open_trackers(folder: Path, *names: str) -> Trackers:
    return Trackers(TrackedRun(TrackingConfig(trackers=dict.fromkeys(names, True)), folder, {}))


def use(trackers: Trackers, folder: Path) -> None:
    with trackers:
        log = MetricsLog(folder, trackers)
        log.write(1, {"loss": 0.5})
        trackers.table("speedup", ["head"], [["stock"]])
        trackers.artifact("evaluation", "evaluation", [], {"a.svg": ""})
        log.write(2, {"loss": 0.25})
        log.close()


@pytest.mark.parametrize("error", [RuntimeError("no\nroute"), SystemExit(1), KeyError("loss")], ids=repr)
@pytest.mark.parametrize("broken", METHODS)
def test_a_tracker_that_raises_warns_once_and_stops_neither_the_run_nor_another(
    broken: str,
    error: BaseException,
    fakes: dict[str, FakeTracker],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes |= {"first": FakeTracker(broken, error), "second": FakeTracker("nothing", error)}
    use(open_trackers(tmp_path, "first", "second"), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert fakes["second"].calls == ["begin", "log", "table", "artifact", "log", "finish"]
    assert fakes["first"].calls.count(broken) == 1
    assert "finish" in fakes["first"].calls or broken == "begin"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("first is off ")


def test_a_tracker_that_fails_gets_no_further_calls_but_the_last(fakes: dict[str, FakeTracker], tmp_path: Path) -> None:
    fakes["first"] = FakeTracker("table", OSError("disk"))
    trackers = open_trackers(tmp_path, "first")
    use(trackers, tmp_path)
    assert fakes["first"].calls == ["begin", "log", "table", "finish"]
    assert not trackers.is_on


def test_nothing_begins_before_something_is_sent(fakes: dict[str, FakeTracker], tmp_path: Path) -> None:
    fakes["first"] = FakeTracker("nothing", OSError())
    with open_trackers(tmp_path, "first") as trackers:
        assert trackers.is_on
    assert fakes["first"].calls == []


@pytest.mark.parametrize("failed", [False, True])
def test_a_job_that_ends_with_an_error_is_a_failed_run(
    failed: bool, fakes: dict[str, FakeTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endings: list[bool] = []
    fakes["first"] = FakeTracker("nothing", OSError())
    monkeypatch.setattr(fakes["first"], "finish", endings.append)
    error = UserError("train.max_bad_steps=1: ...")
    with pytest.raises(UserError) if failed else open_trackers(tmp_path), open_trackers(tmp_path, "first") as trackers:
        trackers.log(1, {})
        if failed:
            raise error
    assert endings == [failed]


def test_a_tracker_that_is_switched_off_is_not_used() -> None:
    config = TrackingConfig(trackers={"wandb": True, "mlflow": False})
    assert config.chosen == ["wandb"]
    check_trackers(config)


def test_every_tracker_is_a_module_and_a_preset_of_the_same_name() -> None:
    presets = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "tracking").glob("*.yaml")}
    assert sorted(presets) == sorted(["jsonl", "none", *known_trackers()])
    assert all(presets[name] == {"trackers": {name: True}} for name in known_trackers())


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "mlflow" else SimpleNamespace())
    line = refused("tracking=[wandb,mlflow]")
    assert line == "tracking=mlflow: the package mlflow is missing; run: pip install mlflow"


def test_unknown_names_are_refused_with_the_known_ones(refused: Refused) -> None:
    line = refused("+tracking.trackers.comet=true")
    names = ", ".join(known_trackers())
    assert line == f"tracking.trackers.comet: unknown tracker; choose from {names}"
    line = refused("tracking=comet")
    assert line.startswith("tracking=comet: there is no such choice of tracking")
    assert all(name in line for name in known_trackers())


def test_several_trackers_and_none_are_chosen_together(light: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    arguments = ["tracking=[none,wandb,tensorboard]", "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main("+recipe=distill", *light, *arguments) == 0
    assert list(tmp_path.glob("wandb/*run-*/*.wandb"))
    assert list(tmp_path.glob("tensorboard/events.*"))
    assert not (tmp_path / "metrics.jsonl").exists()
