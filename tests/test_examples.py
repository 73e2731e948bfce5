"""Everything in examples/ runs: prompts, template, a user's own loss and recipe."""

import json
import re
from pathlib import Path

import pytest
import torch

from mtptrain.traces.prompts import read_prompt_rows
from tests.command import ROOT, fitting, read_metrics, run_main

EXAMPLES = ROOT / "examples"
DOMAINS = ["chat", "code", "maths", "prose"]


def test_the_list_of_examples_names_every_one() -> None:
    listed = re.findall(r"\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    there = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "outputs")}
    assert there == {name.split("/")[0] for name in listed if not name.startswith("..")}
    assert all((EXAMPLES / name).exists() for name in listed)


def test_every_domain_has_prompts() -> None:
    sources = read_prompt_rows([str(EXAMPLES / "prompts")])
    assert [source.prompt_rows[0].domain for source in sources] == DOMAINS
    assert all(len(source.prompt_rows) == 8 for source in sources)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments that make the recipes of examples/own known."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "own"))
    return ["--config-dir", str(EXAMPLES / "own")]


def test_a_loss_of_ones_own_trains_a_head(own: list[str], light: list[str], tmp_path: Path) -> None:
    settings = [*fitting(["+recipe=distill", *light])[1:], "evaluate_at_end=false", "train.steps=3"]
    assert run_main(*own, "+recipe=hellinger", *settings, f"output_dir={tmp_path}") == 0
    losses = [row["loss/step_1"] for row in read_metrics(tmp_path)]
    assert len(losses) == 3
    assert all(0 < loss < 1 for loss in losses)  # the bounds of this distance
    assert losses[-1] < losses[0]


def test_the_loss_of_the_example_is_the_distance_of_its_formula(own: list[str]) -> None:
    from my_mtp.hellinger import squared_hellinger

    student_KTV, teacher_TV = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    q, p = student_KTV.softmax(-1), teacher_TV.softmax(-1)
    expected = 0.5 * (q.sqrt() - p.sqrt()).square().sum(-1)
    torch.testing.assert_close(squared_hellinger(student_KTV, teacher_TV), expected)


def test_a_recipe_of_ones_own_runs_on_the_prompts(
    own: list[str], backbone_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = f"prompts={EXAMPLES / 'prompts'}"
    settings = [f"backbone.path={backbone_folder}", "evaluation.num_prompts=4", "decoding.max_new_tokens=6"]
    assert run_main(*own, "+recipe=rejected_words", prompts, *settings, f"output_dir={tmp_path}") == 0
    assert sorted(json.loads((tmp_path / "rejected.json").read_text(encoding="utf-8"))) == DOMAINS
    assert "code: " in capfd.readouterr().out


def test_a_setting_that_the_own_recipe_does_not_read_is_refused(
    own: list[str], backbone_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*own, "+recipe=rejected_words", f"backbone.path={backbone_folder}", "train.steps=3") == 2
    assert "train.steps=3: belongs to +recipe=" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("my_mtp.nothing", "there is no such module"),
        ("nobodys_package.recipe", "there is no such module"),
        ("my_mtp.a b", "there is no such module"),
        ("json.decoder", "has no function run and no reads"),
    ],
)
def test_a_task_that_names_no_program_is_refused(
    own: list[str], task: str, answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("+recipe=distill", f"task='{task}'") == 2
    assert answer in capfd.readouterr().err
