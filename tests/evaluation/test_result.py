"""Results that are stored and read again."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtptrain.doctor.result import DoctorResult
from mtptrain.errors import UserError
from mtptrain.evaluation.comparison_result import Comparison
from mtptrain.evaluation.result import SCHEMA, read_evaluation, write_evaluation
from mtptrain.run.typed_json import from_json, to_json
from tests.evaluation.recorded import EVALUATIONS, recorded_evaluation, recorded_json


@pytest.mark.parametrize("path", EVALUATIONS.values(), ids=EVALUATIONS)
def test_a_stored_evaluation_is_read_and_written_without_a_loss(path: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(path, "recorded")
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert (tmp_path / "evaluation.json").read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert read_evaluation(tmp_path, "recorded") == evaluation  # a run's folder will do


@pytest.mark.parametrize(("name", "kind"), [("comparison", Comparison), ("doctor", DoctorResult)])
def test_other_results_survive_json(name: Any, kind: type) -> None:
    stored = recorded_json(name)
    assert to_json(from_json(kind, stored)) == stored


def test_keys_that_are_numbers_are_numbers() -> None:
    evaluation = recorded_evaluation()
    assert list(evaluation.draft_lengths) == list(evaluation.heads[0].replay) == [1, 2, 3]
    assert (evaluation.first_batch, list(evaluation.speedup)) == (1, [1, 2])


def stored(**changes: object) -> str:
    return json.dumps(json.loads(EVALUATIONS["greedy"].read_text(encoding="utf-8")) | changes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", f"schema: expected {SCHEMA}, got None"),
        (stored(schema=SCHEMA - 1), f"schema: expected {SCHEMA}, got {SCHEMA - 1}"),
        (stored(heads=[{}]), r"heads\[0\].name: missing field of HeadResult"),
        (stored(speedup={"one": {}}), "speedup: expected an object with whole numbers as keys"),
        (stored(draft_length="4"), "draft_length: expected int, got '4'"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused_with_the_reason(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=rf"plan.evaluation={tmp_path}: is no evaluation.json .*{reason}.*; give one"):
        read_evaluation(tmp_path, "plan.evaluation")


def test_a_missing_file_is_refused_with_its_setting() -> None:
    with pytest.raises(UserError, match=r"plan.evaluation=/absent: cannot be read \(No such file"):
        read_evaluation(Path("/absent"), "plan.evaluation")


def test_a_name_that_no_file_can_have_is_refused_with_its_setting() -> None:
    with pytest.raises(UserError, match=r"plan.evaluation=x+: cannot be read \(File name too long\)"):
        read_evaluation(Path("x" * 300), "plan.evaluation")
