"""Settings that are sound by themselves, in combinations that once ended badly."""

import json
from pathlib import Path

import pytest

from mtptrain.evaluation.result import read_evaluation
from mtptrain.hidden_cache.consumed import CONSUMED
from tests.command import Refused, read_metrics, run_main
from tests.light import certified


@pytest.fixture
def run_folder(light: list[str], tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    run = tmp_path / "trained"
    training = ["train.steps=2", "train.checkpoint_every=1", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *light, *training, f"output_dir={run}") == 0
    return run


def test_a_draft_step_without_heldout_targets_has_no_figure(light: list[str], tmp_path: Path) -> None:
    """Documents of three tokens have no target of the second step."""
    corpus, prompts, run = (tmp_path / name for name in ("corpus.jsonl", "prompts.jsonl", "run"))
    corpus.write_text("".join(json.dumps({"text": "ab"[number % 2]}) + "\n" for number in range(40)))
    prompts.write_text('{"prompt": "def rule_1(x: int)"}\n{"prompt": "# a line"}\n')
    settings = [f"data.path={corpus}", f"prompts={prompts}", "train.steps=1", "evaluation.every=1"]
    with certified():
        assert run_main("+recipe=distill", *light, *settings, f"output_dir={run}") == 0
    for head in read_evaluation(run, "path").heads:
        assert head.teacher_forced.alpha[0] is not None
        forced = head.teacher_forced
        assert (forced.alpha[1], forced.top1[1], forced.tokens[1]) == (
            None,
            None,
            0,
        )
    assert [row["heldout/alpha_2"] for row in read_metrics(run) if "heldout/alpha_2" in row] == [None]


@pytest.mark.parametrize("recipe", ["evaluate", "watch"])
def test_all_checkpoints_are_those_of_a_run(recipe: str, run_folder: Path, refused: Refused) -> None:
    one, every = run_folder / "checkpoints" / "step_00000001", ["checkpoints=all"] * (recipe == "evaluate")
    line = refused(f"checkpoint={one}", *every, recipe=recipe)
    assert line == f"checkpoint={one}: is one checkpoint; give the folder of its run, as in checkpoint={run_folder}"


def test_a_refused_run_takes_no_stream_cache(light: list[str], tmp_path: Path, refused: Refused) -> None:
    """The claim of a run that deletes shards keeps every other run away."""
    cache = tmp_path / "cache"
    assert run_main("+recipe=collect", *light, f"output_dir={cache}") == 0
    follow = ["data=streams", f"data.path={cache}", "data.follow=true", "data.delete_consumed=true"]
    line = refused(*follow, "data.sequence_length=8", "evaluate_at_end=false")
    assert line.startswith("data.sequence_length=8: the cache")
    assert not (cache / CONSUMED).exists()


def test_a_sweep_of_texts_on_the_screen_has_a_folder(light: list[str], tmp_path: Path) -> None:
    settings = ["checkpoint=stock", "prompt=The", "generate.show=text", "seed=1,2", f"output_dir={tmp_path / 'sweep'}"]
    assert run_main("-m", "+recipe=generate", *light, *settings) == 0
    assert (tmp_path / "sweep" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("o_groups=3", "o_groups=3: must divide num_attention_heads x head_dim = 128"),
        ("rope_head_dim=64", "rope_head_dim=64: are dimensions of a head and of an index head; use at most 32"),
        ("index_head_dim=8", "rope_head_dim=16: are dimensions of a head and of an index head; use at most 8"),
        ("hidden_size=12", "hidden_size=12: must be a multiple of 8, as matrix products of experts need"),
        ("expert_size=1", "expert_size=1: must be a multiple of 8, as matrix products of experts need"),
    ],
)
def test_a_shape_that_no_layer_can_compute_is_refused(
    setting: str, rule: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["release.random=true", f"backbone.shape.{setting}", f"output_dir={tmp_path / 'new'}"]
    assert run_main("+recipe=mini_release", *arguments) == 2
    assert capfd.readouterr().err == f"mtptrain: backbone.shape.{rule}\n"
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_backbones_training_names_the_backbone_in_it(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text("{}")
    line = refused("checkpoint=stock", f"backbone.path={tmp_path}", recipe="evaluate")
    assert line.endswith(f"; did you mean backbone.path={tmp_path / 'backbone'}?")


def test_a_column_that_holds_no_text_is_named_with_its_type(tmp_path: Path, refused: Refused) -> None:
    corpus = tmp_path / "numbers.jsonl"
    corpus.write_text('{"text": 5}\n')
    assert f"data.field_name=text: data.path={corpus}, row 1 holds a value of type int, no text, " in refused(
        f"data.path={corpus}"
    )
