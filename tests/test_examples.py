"""Everything in examples/ runs: prompts, template, a user's own loss and recipe, the walk-through and the notebook."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from mtptrain.evaluation.result import read_evaluation
from mtptrain.traces.prompts import read_prompt_rows
from tests.command import ROOT, fitting, measuring_little, read_metrics, run_main

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "first_hour.ipynb"
WALK = EXAMPLES / "v4_flash.sh"
DOMAINS = ["chat", "code", "maths", "prose"]
SMALL_CELL = """
BACKBONE = {folder!r}
TRAINING = {{"train.steps": 2, "train.log_every": 1, "train.batch_size": 2, "data.sequence_length": 32,
             "evaluation.every": 0, "data.max_documents": 8, "mtp.steps": 3}}
DECODING = {{"decoding.draft_length": 2, "decoding.max_new_tokens": 6}}
MEASURING = {{"evaluation.num_prompts": 2, "evaluation.timed_prompts": 1, "evaluation.batch_sizes": [1],
              "evaluation.heldout_sequences": 2, "evaluation.prompt_tokens": 12, "data.max_documents": 8}}
"""


def test_the_list_of_examples_names_every_one() -> None:
    listed = re.findall(r"\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    there = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "outputs")}
    assert there == {name.split("/")[0] for name in listed if not name.startswith("..")}
    assert all((EXAMPLES / name).exists() for name in listed)


def test_every_domain_has_prompts() -> None:
    sources = read_prompt_rows([str(EXAMPLES / "prompts")])
    assert [source.prompt_rows[0].domain for source in sources] == DOMAINS
    assert all(len(source.prompt_rows) == 8 for source in sources)


def notebook_cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return the value of its last expression, if it ends with one."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_the_notebook_runs_from_top_to_bottom(
    light: list[str], backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it writes its runs
    plt.switch_backend("agg")
    names: dict[str, Any] = {}
    shown = []
    with measuring_little():
        for cell in notebook_cells():
            if cell["cell_type"] == "code":
                is_first = "parameters" in cell["metadata"].get("tags", [])
                source = SMALL_CELL.format(folder=str(backbone_folder)) if is_first else "".join(cell["source"])
                shown.append(run_cell(source, names))
    plt.close("all")
    assert names["evaluation"].certificate.passed
    assert "<table>" in names["evaluation"]._repr_html_()
    assert names["evaluation"] in shown


def test_the_small_settings_replace_those_of_the_notebook() -> None:
    (first,) = (cell for cell in notebook_cells() if "parameters" in cell["metadata"].get("tags", []))
    pattern = re.compile(r"^([A-Z]+) =", re.MULTILINE)
    assert pattern.findall("".join(first["source"])) == pattern.findall(SMALL_CELL)


def test_the_notebook_shows_the_outputs_of_one_whole_run() -> None:
    cells = [cell for cell in notebook_cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    assert {"display_data", "execute_result"} <= kinds
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "certificate passed" in text
    assert not re.search(r'"/(home|root|tmp|work)', text)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments that make the recipes of examples/own known."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "own"))
    return ["--config-dir", str(EXAMPLES / "own")]


def test_a_loss_of_ones_own_trains_a_head(own: list[str], light: list[str], tmp_path: Path) -> None:
    settings = [*fitting(["+recipe=distill", *light])[1:], "evaluate_at_end=false"]
    settings += ["train.steps=16", "train.batch_size=8"]  # enough that other rows matter less than what is learned
    assert run_main(*own, "+recipe=hellinger", *settings, f"output_dir={tmp_path}") == 0
    losses = [row["loss/step_1"] for row in read_metrics(tmp_path)]
    assert len(losses) == 16
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
    given = [f"prompts={EXAMPLES / 'prompts'}", f"backbone.path={backbone_folder}", "train.steps=3"]
    assert run_main(*own, "+recipe=rejected_words", *given) == 2
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


def walk_commands(folder: Path) -> list[list[str]]:
    """Return the settings of every command of the walk-through, in order, without its sizes."""
    lines = [line for line in WALK.read_text(encoding="utf-8").splitlines() if line.startswith("mtptrain +recipe=")]
    words = [shlex.split(line.replace("$folder", str(folder)))[1:] for line in lines]
    return [[word for word in command if word != "${small[@]}" and not word.startswith("train.")] for command in words]


def test_the_walk_through_goes_from_the_release_to_an_export(
    light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for command in walk_commands(tmp_path):
        given = {word.partition("=")[0] for word in command}
        sizes = [] if "task=plan" in command else [one for one in light if one.partition("=")[0] not in given]
        sizes += ["evaluation.num_prompts=4"] if "prompts" in given else []
        is_diagnosed = command[0] == "+recipe=doctor"  # as useless: the weights of this backbone and head are random
        assert run_main(command[0], *sizes, *command[1:]) == (3 if is_diagnosed else 0), command
    evaluation = read_evaluation(tmp_path / "measured", "path")
    assert evaluation.certificate.passed
    assert sorted(evaluation.last_head.domains) == DOMAINS
    assert (tmp_path / "served" / "config.json").is_file()


def test_shellcheck_accepts_the_walk_through() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([checker, WALK], capture_output=True, text=True, check=False).stdout == ""
