"""Comparisons of heads and of several runs of one setting."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.command import Refused, run_main
from tests.conftest import save_backbone
from tests.light import certified


def test_a_head_of_another_backbone_is_refused_before_traces_are_made(
    light: list[str], tmp_path: Path, refused: Refused
) -> None:
    trained, other = tmp_path / "trained", tmp_path / "other"
    training = ["train.steps=1", "evaluate_at_end=false", f"output_dir={trained}"]
    assert run_main("+recipe=distill", *light, *training) == 0
    other.mkdir()
    save_backbone(other, index_topk=2)
    line = refused(f"backbone.path={other}", f"checkpoints=[stock,{trained}]", recipe="compare")
    assert re.match(
        rf"checkpoint={trained}/.*: holds backbone=.* and this run has .*set backbone or backbone.path", line
    )


@pytest.fixture(scope="module")
def seeds(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their seed, the second with a `best`; do not write into them."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        more = [f"seed={seed}", "mtp.init=fresh", "evaluation.every=1", "evaluate_at_end=false"]
        assert run_main("+recipe=distill", *light, *more, f"output_dir={folder}/{seed}") == 0
    return [folder / "0", folder / "1"]


def test_runs_of_one_setting_are_pooled(
    seeds: list[Path], light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heads = f"checkpoints=[stock,[{seeds[0]},{seeds[1]}]]"
    policy = ["decoding.temperature=0.5", "decoding.top_p=0.9"]
    assert run_main("+recipe=compare", *light, heads, *policy, f"output_dir={tmp_path}") == 0
    result = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    pooled = result["heads"][1]
    lengths = [run["acceptance_length"]["2"] for run in pooled["runs"]]
    assert pooled["replay"]["2"]["acceptance_length"] == pytest.approx(sum(lengths) / 2)
    assert len(result["comparisons"]) == 1
    assert (result["policy"]["temperature"], result["policy"]["top_p"]) == (0.5, 0.9)
    output = capfd.readouterr().out
    assert output.startswith("2 prompts, temperature 0.5, sampled drafts, token verification, top_p 0.9\n")
    assert "mean of 2 runs" in output
    assert "over runs and prompts" in output


def test_the_prompts_that_chose_a_best_checkpoint_are_counted(
    seeds: list[Path], light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    best = seeds[1] / "checkpoints" / "best"
    assert run_main("+recipe=compare", *light, f"checkpoints=[stock,{best}]", f"output_dir={tmp_path}/one") == 0
    (run,) = json.loads((tmp_path / "one" / "comparison.json").read_text(encoding="utf-8"))["heads"][1]["runs"]
    assert run["chosen_on"] == {"prompts": 2, "shared": 2, "by": "replay/expected_length_2"}
    assert "was chosen as the best of its run on 2 of these 2 prompts" in capfd.readouterr().err
    with certified():
        assert run_main("+recipe=evaluate", *light, f"checkpoint={best}", f"output_dir={tmp_path}/two") == 0
    evaluation = json.loads((tmp_path / "two" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["heads"][1]["chosen_on"] == run["chosen_on"]
    assert "was chosen as the best of its run" in (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    other = ["evaluation.prompt_tokens=11", f"checkpoints=[stock,{best}]", f"output_dir={tmp_path}/three"]
    assert run_main("+recipe=compare", *light, *other) == 0
    (run,) = json.loads((tmp_path / "three" / "comparison.json").read_text(encoding="utf-8"))["heads"][1]["runs"]
    assert run["chosen_on"]["shared"] == 0


def test_a_run_that_is_listed_twice_as_a_seed_is_refused(seeds: list[Path], tmp_path: Path, refused: Refused) -> None:
    copies = f"checkpoints=[stock,[{seeds[0]},{seeds[0]}/checkpoints]]"
    assert re.match(r"checkpoints=.*: a setting lists a run once", refused(copies, recipe="compare"))
    shutil.copytree(seeds[0] / "checkpoints", tmp_path / "checkpoints")
    copies = f"checkpoints=[stock,[{seeds[1]},{seeds[0]},{tmp_path}]]"
    assert re.match(r"checkpoints=.*: a setting lists a run once", refused(copies, recipe="compare"))
    assert re.match(r"checkpoints=.*: a setting lists a run once", refused("checkpoints=[[a,a],b]", recipe="compare"))
    assert re.match(
        r"checkpoints=.*: the stock head is a setting", refused("checkpoints=[[a,stock],b]", recipe="compare")
    )


def test_heads_of_different_forms_are_no_seeds_of_one_setting(
    seeds: list[Path], light: list[str], tmp_path: Path, refused: Refused
) -> None:
    other = tmp_path / "stacked"
    more = ["mtp.mode=stacked", "mtp.depth=2", "evaluate_at_end=false", f"output_dir={other}"]
    assert run_main("+recipe=distill", *light, *more) == 0
    line = refused(f"checkpoints=[stock,[{seeds[0]},{other}]]", recipe="compare")
    assert re.match(r"checkpoints=.*differ in more than their seed: mtp.mode=shared .* and mtp.mode=stacked", line)
