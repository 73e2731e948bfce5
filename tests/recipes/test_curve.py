"""Every checkpoint of a run measured, after its training and during it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtptrain.recipes import curve, watch
from mtptrain.run.folder_lock import is_held
from tests.command import Refused, hold_folder, run_main
from tests.conftest import save_backbone
from tests.light import certified
from tests.recipes.drawn import check_drawn

STEPS = 3


@pytest.fixture(scope="module")
def trained(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints and a `best`; do not write into it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    more = ["train.steps=3", "train.keep_checkpoints=3", "evaluation.every=1", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *more, f"output_dir={folder}") == 0
    return folder


def measure(light: list[str], run: Path, output: Path, *more: str) -> dict[str, Any]:
    arguments = [f"checkpoint={run}", "checkpoints=all", f"output_dir={output}", *more]
    assert run_main("+recipe=evaluate", *light, *arguments) == 0
    return json.loads((output / "curve.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(trained: Path, light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measurement of all checkpoints of that run; do not write into it."""
    folder = tmp_path_factory.mktemp("measured")
    with certified():
        measure(light, trained, folder)
    return folder


def test_all_checkpoints_are_measured_and_the_last_one_is_decoded(trained: Path, measured: Path) -> None:
    result = json.loads((measured / "curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in result["points"]] == [1, 2, 3]
    best = json.loads((trained / "checkpoints" / "best" / "checkpoint.json").read_text(encoding="utf-8"))
    assert result["best_step"] == best["content"]["step"]
    (decoded,) = measured.glob("step_*")
    evaluation = json.loads((decoded / "evaluation.json").read_text(encoding="utf-8"))
    assert decoded.name == "step_00000003"
    assert evaluation["heads"][1]["replay"] == result["points"][-1]["replay"]
    assert evaluation["heads"][0]["replay"] == result["stock"]
    assert evaluation["gain"] == result["points"][-1]["gain"]
    page = (measured / "curve.html").read_text(encoding="utf-8")
    assert "Acceptance length against training steps" in page
    assert not re.search(r"""(src|href)=["']?https?:|@import""", page)
    assert f"{result['best_step']} (best)" in page
    check_drawn(measured, "curve.html", 1)


def test_a_continued_measurement_measures_only_what_is_missing(
    trained: Path, light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints" / "best")  # it may be the one that is missing
    aside = (run / "checkpoints" / "step_00000003").rename(tmp_path / "aside")
    first = measure(light, run, output, "evaluation.decoded=none")
    aside.rename(run / "checkpoints" / "step_00000003")
    steps = []
    replay = curve.CurveBuilder.measure

    def count(builder: curve.CurveBuilder, folder: Path) -> None:
        steps.append(folder.name)
        replay(builder, folder)

    monkeypatch.setattr(curve.CurveBuilder, "measure", count)
    stale = output / "step_00000003" / "evaluation.json"
    stale.parent.mkdir()
    stale.write_text("of an earlier checkpoint of this step", encoding="utf-8")
    second = measure(light, run, output, "evaluation.decoded=none", "resume=auto")
    assert not stale.exists()
    assert steps == ["step_00000003"]
    assert second["points"][: len(first["points"])] == first["points"]
    assert [point["step"] for point in second["points"]] == [1, 2, 3]
    assert run_main("+recipe=evaluate", *light, f"checkpoint={run}", "checkpoints=all", f"output_dir={output}") == 2


def test_a_measurement_of_other_settings_is_not_continued(
    trained: Path, measured: Path, light: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={trained}", "checkpoints=all", "resume=auto", f"output_dir={measured}"]
    assert run_main("+recipe=evaluate", *light, *arguments, "decoding.draft_length=1") == 2
    assert "draft_length=2 and this run has draft_length=1" in capfd.readouterr().err
    assert run_main("+recipe=evaluate", *light, *arguments, "data.heldout_every=2") == 2
    assert re.search(
        "holds sources.heldout=.* and this run has .*; set prompts and data to match", capfd.readouterr().err
    )


def test_a_damaged_checkpoint_is_named_and_the_others_are_measured(
    trained: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    tensors = run / "checkpoints" / "step_00000002" / "module.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    result = measure(light, run, tmp_path / "out", "evaluation.decoded=none")
    assert [point["step"] for point in result["points"]] == [1, 3]
    assert re.match("step_00000002 was skipped: .*truncated or altered", result["skipped"][0])
    assert "was skipped" in (tmp_path / "out" / "curve.html").read_text(encoding="utf-8")
    assert "Acceptance length by checkpoint" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("checkpoint=stock checkpoints=all", "checkpoints=all: needs the folder of a run"),
        ("checkpoint=absent checkpoints=all", "checkpoint=absent: no checkpoint there"),
        ("checkpoint=stock checkpoints=some", "checkpoints=some: must be `all`, or a list"),
        ("checkpoint=stock checkpoints=[[a],[]]", "checkpoints=.*must be `all`, or a list"),
        ("checkpoint=stock evaluation.decoded=first", "evaluation.decoded=first: must be last, best, all or none"),
    ],
)
def test_a_wrong_choice_of_checkpoints_is_refused(given: str, line: str, refused: Refused) -> None:
    assert re.match(line, refused(*given.split(), recipe="evaluate"))


@pytest.mark.parametrize("given", ["checkpoint=null", "checkpoint=stock", "checkpoint=absent"])
def test_a_watch_without_a_run_is_refused(given: str, refused: Refused) -> None:
    assert re.match(r"checkpoint=\w+: .*training run", refused(given, recipe="watch"))


def test_a_watch_measures_checkpoints_as_they_appear_and_ends_with_the_run(
    trained: Path, light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run grows while it is watched: a checkpoint that is being copied, then whole ones, then the last."""
    run, output = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    looks: list[list[str]] = []
    look = watch._measure_pending

    def grow(session: Any, builder: Any, refusals: Any) -> None:
        source, target = trained / "checkpoints", run / "checkpoints"
        name = f"step_{min(1 + len(looks) // 2, STEPS):08d}"
        if len(looks) % 2 == 0 and not (target / name).exists():  # half-written: the manifest came first
            shutil.copytree(source / name, target / name)
            tensors = target / name / "module.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:100])
        else:
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        look(session, builder, refusals)
        looks.append([f"{point.step}" for point in builder.curve.points])

    monkeypatch.setattr(watch, "_measure_pending", grow)
    arguments = ["watch.poll_seconds=0.01", f"checkpoint={run}", f"output_dir={output}"]
    assert run_main("+recipe=watch", *light, *arguments) == 0
    result = json.loads((output / "curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in result["points"]] == [1, 2, 3]
    assert result["skipped"] == []
    assert looks[:4] == [[], ["1"], ["1"], ["1", "2"]]
    assert not list(output.glob("step_*"))


def test_a_watch_ends_at_its_time_limit_and_names_what_it_could_not_read(
    trained: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    (run / "checkpoints" / "step_00000002" / "module.safetensors").unlink()
    arguments = ["watch.minutes=0", f"checkpoint={run}", f"output_dir={tmp_path}/out"]
    assert run_main("+recipe=watch", *light, *arguments) == 0
    result = json.loads((tmp_path / "out" / "curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in result["points"]][:1] == [1]
    assert re.match("step_00000002 was skipped: .*missing, truncated or altered", result["skipped"][0])
    errors = " ".join(capfd.readouterr().err.split())
    assert "for at most 0:00: it is not training now; checkpoints to measure yet: 3" in errors
    assert "is not finished after 0:00: the watch ends" in errors


def test_a_watch_waits_for_the_last_checkpoint_to_become_whole_and_not_for_ever(
    trained: Path, light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    last = run / "checkpoints" / "step_00000003" / "module.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    shutil.rmtree(run / "checkpoints" / "best")
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.0)
    arguments = ["watch.poll_seconds=0.01", f"checkpoint={run}"]
    assert run_main("+recipe=watch", *light, *arguments, f"output_dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out" / "curve.json").read_text(encoding="utf-8"))
    assert ([point["step"] for point in result["points"]], len(result["skipped"])) == ([1, 2], 1)
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 100.0)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: last.write_bytes(whole))
    again = ["resume=auto", f"output_dir={tmp_path}/out"]
    assert run_main("+recipe=watch", *light, *arguments, *again) == 0
    result = json.loads((tmp_path / "out" / "curve.json").read_text(encoding="utf-8"))
    assert ([point["step"] for point in result["points"]], result["skipped"]) == ([1, 2, 3], [])


def test_a_watch_of_heads_of_another_backbone_is_refused_at_once(
    trained: Path, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_backbone(other, index_topk=2)
    arguments = [f"backbone.path={other}", f"checkpoint={trained}", f"output_dir={tmp_path}/out"]
    assert run_main("+recipe=watch", *light, *arguments) == 2
    assert "set backbone or backbone.path to match" in capfd.readouterr().err


def test_a_watch_shows_its_rows_in_the_runs_own_tracker(trained: Path, light: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = shutil.copytree(trained, tmp_path / "run")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("trackers: {}", "trackers: {tensorboard: true}"), encoding="utf-8")
    assert run_main("+recipe=watch", *light, f"checkpoint={run}", f"output_dir={tmp_path}/out") == 0
    events = EventAccumulator(str(run / "tensorboard" / "watch"))
    events.Reload()
    rows = [(event.step, event.value) for event in events.Scalars("measured/acceptance_length_2")]
    result = json.loads((tmp_path / "out" / "curve.json").read_text(encoding="utf-8"))
    wanted = [(point["step"], point["replay"]["2"]["acceptance_length"]) for point in result["points"]]
    assert rows == [(step, pytest.approx(value)) for step, value in wanted]


def test_a_run_that_is_being_written_can_be_watched(trained: Path, light: list[str], tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    process = hold_folder(run)
    try:
        assert is_held(run)
        assert run_main("+recipe=watch", *light, f"checkpoint={run}", f"output_dir={tmp_path}/out") == 0
    finally:
        process.kill()
        process.communicate()
