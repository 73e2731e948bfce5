import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.training_page import print_training, training_of, write_training_page
from mtptrain.evaluation.report.training_plots import MOST_POINTS, thinned, training_figures
from mtptrain.run.record import MetricCurve, RunRecord, read_record
from tests.evaluation.recorded import LAST_STEP, METRICS, recorded_evaluation
from tests.evaluation.report.test_page import Page


def record_of(folder: Path, rows: str, steps: int = LAST_STEP) -> RunRecord:
    (folder / "metrics.jsonl").write_text(rows, encoding="utf-8")
    (folder / "config.yaml").write_text(f"task: distill\ntrain: {{steps: {steps}}}\n")
    record = read_record(folder)
    assert record is not None
    return record


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return record_of(tmp_path, METRICS.read_text(encoding="utf-8"))


def test_every_recorded_figure_has_a_curve(record: RunRecord, tmp_path: Path) -> None:
    write_training_page(record, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all("fill: currentColor" in style for style in re.findall('<text style="(.*?)"', text))  # also in the dark
    captions = ("Training loss by draft step", "Acceptance alpha", "Acceptance length by replay", "Learning rate")
    for caption in (*captions, "Gradient norm", "Training speed", "Load of the busiest expert"):
        assert caption in page.text
    assert page.text.count(f"Step {LAST_STEP} of {LAST_STEP}; loss ") == 1
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_report_shows_the_training_of_its_head(record: RunRecord, tmp_path: Path) -> None:
    evaluation = recorded_evaluation()
    assert training_of(evaluation, tmp_path / "elsewhere") is None
    assert training_of(evaluation, record.folder) == record
    write_report(evaluation, tmp_path / "report.html", record)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Training</h2>" in text
    assert set(training_figures(record)) <= set(re.findall("<figcaption>(.*?)</figcaption>", text))
    write_report(evaluation, tmp_path / "report.html")
    assert "<h2>Training</h2>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_training_that_is_not_finished_says_how_to_go_on(tmp_path: Path) -> None:
    record = record_of(tmp_path, '{"step": 10, "loss/step_1": 2.5, "gradient_norm": null}\n', steps=20)
    stream = io.StringIO()
    print_training(record, Console(file=stream, width=200))
    assert "step 10 of 20; loss 2.500 at the first draft step" in stream.getvalue()
    assert f"not finished; continue with resume=auto output_dir={tmp_path}" in stream.getvalue()
    write_training_page(record, tmp_path / "report.html")


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, 1e-30])
def test_any_finite_figure_is_drawn(value: float, tmp_path: Path) -> None:
    rows = [
        json.dumps({"step": step, "gradient_norm": step * value + 1e-3, "loss/step_1": value}) for step in (1, 2, 3)
    ]
    drawn = training_figures(record_of(tmp_path, "\n".join(rows)))
    assert len(drawn) == 2
    assert not any("nan" in text for text in drawn.values())


def test_held_out_text_is_drawn_beside_the_training_text(tmp_path: Path) -> None:
    rows = (
        '{"step": 1, "alpha/step_1": 0.5}\n{"step": 1, "heldout/alpha_1": 0.4}\n{"step": 2, "heldout/alpha_1": 0.45}\n'
    )
    text = training_figures(record_of(tmp_path, rows))["Acceptance alpha by draft step"]
    assert "held-out text" in text
    assert "training text" in text


def test_long_runs_are_drawn_as_means() -> None:
    count = 10 * MOST_POINTS
    thin = thinned(MetricCurve(list(range(1, count + 1)), [float(step % 2) for step in range(count)]))
    assert len(thin.steps) == MOST_POINTS
    assert thin.steps[-1] == count
    assert set(thin.values) == {0.5}
