"""A certificate that fails: everything is written, and the exit code says so."""

from dataclasses import replace
from pathlib import Path

import pytest

from mtptrain.evaluation.result import read_evaluation
from mtptrain.recipes import evaluate
from tests.command import run_main
from tests.evaluation.recorded import recorded_evaluation


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = replace(recorded_evaluation().certificate, passed=False)
    monkeypatch.setattr(evaluate, "make_certificate", lambda *_: certificate)


def check_written(folder: Path) -> None:
    assert not read_evaluation(folder, "path").certificate.passed
    assert '<h1 class="failed">CERTIFICATE FAILED' in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("failing")
def test_an_evaluation_whose_certificate_fails_ends_with_exit_code_3(light: list[str], tmp_path: Path) -> None:
    assert run_main("+recipe=evaluate", *light, "checkpoint=stock", f"output_dir={tmp_path}") == 3
    check_written(tmp_path)


@pytest.mark.usefixtures("failing")
def test_a_training_that_ends_so_is_not_mended_by_another_start(light: list[str], tmp_path: Path) -> None:
    arguments = ["+recipe=distill", *light, f"output_dir={tmp_path}", "resume=auto"]
    assert run_main(*arguments) == 3
    check_written(tmp_path)
    assert run_main(*arguments) == 3
