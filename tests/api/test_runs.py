"""Results from Python are those of the command line, and a loaded backbone is the same after every use."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mtptrain
from mtptrain.api import runs
from mtptrain.run.storage import sha256_file
from mtptrain.traces.file import Trace, read_trace_set
from tests.api.conftest import small_settings
from tests.command import run_main
from tests.evaluation.recorded import EVALUATIONS
from tests.light import certified, measuring_little

EQUAL = ("backbone", "draft_length", "gain", "gain_by_domain", "heads", "policy", "prompts")  # the rest holds times
SIZES = {"decoding.draft_length": 2, "decoding.max_new_tokens": 6}


def figures(folder: Path) -> dict[str, Any]:
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for head in evaluation["heads"]:
        head["checkpoint"] = Path(head["checkpoint"]).name  # the two heads lie in different folders
    return {name: evaluation[name] for name in EQUAL}


@pytest.fixture(scope="module")
def by_command(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training and its evaluation, from the command line."""
    folder = tmp_path_factory.mktemp("command")
    trained, measured = f"output_dir={folder / 'train'}", f"output_dir={folder / 'evaluate'}"
    assert run_main("+recipe=distill", *light, trained, "evaluate_at_end=false") == 0
    with certified():  # the evaluation from Python is not
        assert run_main("+recipe=evaluate", *light, measured, f"checkpoint={folder / 'train'}") == 0
    return folder


@pytest.fixture(scope="module")
def run(
    backbone: mtptrain.LoadedBackbone, light: list[str], tmp_path_factory: pytest.TempPathFactory
) -> mtptrain.TrainedRun:
    """The same training from Python."""
    folder = tmp_path_factory.mktemp("python") / "train"
    return mtptrain.train(backbone, output_dir=folder, settings=small_settings(light, "distill"))


@pytest.fixture(scope="module")
def evaluation(backbone: mtptrain.LoadedBackbone, light: list[str], run: mtptrain.TrainedRun) -> mtptrain.Evaluation:
    """The same evaluation from Python, of the head that was trained there."""
    folder = run.folder.parent / "evaluate"
    with measuring_little():  # as the command did
        return mtptrain.evaluate(backbone, run.head, output_dir=folder, settings=small_settings(light, "evaluate"))


@pytest.fixture(scope="module")
def traces(by_command: Path) -> list[Trace]:
    return read_trace_set(by_command / "evaluate" / "traces.jsonl").traces


def test_train_gives_the_head_of_the_recipe(run: mtptrain.TrainedRun, by_command: Path) -> None:
    file = Path("checkpoints") / "step_00000002" / "module.safetensors"
    assert sha256_file(run.folder / file) == sha256_file(by_command / "train" / file)
    assert run.evaluation is None
    steps, losses = run.curve("loss/step_1")
    assert steps == [1, 2]
    assert all(loss > 0 for loss in losses)


def test_a_training_without_a_log_has_no_rows(
    backbone: mtptrain.LoadedBackbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "run_recipe", lambda *_, **__: tmp_path)
    monkeypatch.setattr(runs, "load_head", lambda *_: None)
    assert mtptrain.train(backbone, settings={"tracking.metrics_file": False}).metrics == []


def test_evaluate_gives_the_figures_of_the_recipe(
    evaluation: mtptrain.Evaluation, run: mtptrain.TrainedRun, by_command: Path
) -> None:
    here, there = run.folder.parent / "evaluate", by_command / "evaluate"
    assert figures(here) == figures(there)
    assert sha256_file(here / "traces.jsonl") == sha256_file(there / "traces.jsonl")
    assert evaluation == mtptrain.read_evaluation(here)
    assert evaluation.certificate.passed


def test_a_run_records_the_command_line_that_repeats_it(
    evaluation: mtptrain.Evaluation, run: mtptrain.TrainedRun
) -> None:
    command = evaluation.provenance.command
    assert command[:4] == ["python", "-m", "mtptrain", "+recipe=evaluate"]
    assert f"checkpoint={run.head.checkpoint}" in command


def test_plain_decoding_gives_the_texts_of_the_traces(backbone: mtptrain.LoadedBackbone, traces: list[Trace]) -> None:
    texts = mtptrain.decode(
        backbone, [trace.prompt.tokens for trace in traces], settings={"decoding.max_new_tokens": 6}
    )
    assert [text.tokens for text in texts] == [trace.tokens for trace in traces]
    assert texts.tokens_per_pass is None


def test_drafts_keep_the_text_and_make_the_passes_of_the_evaluation(
    backbone: mtptrain.LoadedBackbone, traces: list[Trace], evaluation: mtptrain.Evaluation, run: mtptrain.TrainedRun
) -> None:
    prompts = [trace.prompt.tokens for trace in traces]
    for head, measured in zip((mtptrain.load_head(backbone), run.head), evaluation.heads, strict=True):
        texts = mtptrain.decode(backbone, prompts, head, settings=SIZES)
        assert [text.tokens for text in texts] == [trace.tokens for trace in traces]
        assert [len(text.record.passes) for text in texts] == [one.passes for one in measured.per_prompt[2]]
        assert texts.tokens_per_pass == pytest.approx(measured.replay[2].acceptance_length)


def test_a_sampled_text_follows_from_the_seed(backbone: mtptrain.LoadedBackbone) -> None:
    head = mtptrain.load_head(backbone)
    drawn = [
        mtptrain.decode(backbone, "The river", head, settings=SIZES | {"decoding.temperature": 1.0, "seed": seed})[
            0
        ].tokens
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_conversation_is_rendered_and_a_single_prompt_needs_no_list(backbone: mtptrain.LoadedBackbone) -> None:
    settings = SIZES | {"data.chat_template": "builtin"}
    (text,) = mtptrain.decode(backbone, [{"role": "user", "content": "Is it far?"}], settings=settings)
    assert "Is it far?" in text.prompt
    (plain,) = mtptrain.decode(backbone, "Is it far?", settings=SIZES)
    assert plain.record.tokens == mtptrain.decode(backbone, backbone.encode("Is it far?"), settings=SIZES)[0].tokens
    assert backbone.text(backbone.encode("Is it far?")) == plain.prompt


def test_a_batch_is_the_first_one_of_the_training(backbone: mtptrain.LoadedBackbone, light: list[str]) -> None:
    settings = small_settings(light, "distill")
    batch = mtptrain.training_batches(backbone, settings=settings).batch(0)
    assert batch.tokens_BS.shape == batch.segment_BS.shape == (2, 32)
    assert batch.tokens_BS.dtype is torch.int64
    other = mtptrain.training_batches(backbone, settings=settings | {"seed": 1}).batch(0)
    assert not torch.equal(batch.tokens_BS, other.tokens_BS)


def test_results_are_short_on_a_screen_and_tables_in_a_notebook(
    backbone: mtptrain.LoadedBackbone, evaluation: mtptrain.Evaluation, run: mtptrain.TrainedRun
) -> None:
    texts = mtptrain.decode(backbone, "a <b> & c", run.head, settings=SIZES)
    shown = [backbone, run.head, run, evaluation, evaluation.last_head, texts, texts[0]]
    assert max(len(repr(one)) for one in shown) < 400
    length = evaluation.last_head.replay[2].acceptance_length
    assert f"trained {length:.2f}" in repr(evaluation)
    assert f"<td>{length:.2f} (" in evaluation._repr_html_()
    assert "a &lt;b&gt; &amp; c" in texts._repr_html_()


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"train.steps": 3}, "train.steps=3: decode does not read it"),
        ({"decoding.top_p": 0.5}, "matters at a decoding.temperature above 0"),
        ({"decoding.max_new_tokens": 0}, "must be at least 2"),
        ({"decoding.served_as": "vllm"}, "decode does not read it"),
        ({"backbone.path": "x"}, "the backbone is loaded already"),
    ],
)
def test_decode_refuses_a_setting_that_it_does_not_read(
    backbone: mtptrain.LoadedBackbone, settings: dict[str, Any], answer: str
) -> None:
    with pytest.raises(mtptrain.UserError, match=answer):
        mtptrain.decode(backbone, "The river", settings=settings)


@pytest.mark.parametrize(
    "prompts", [[], [[]], 3, [3.5], [[7, 10**6]], [{"role": "user", "content": "x"}], [[7] * 5000]]
)
def test_decode_refuses_what_is_no_prompt(backbone: mtptrain.LoadedBackbone, prompts: Any) -> None:
    with pytest.raises(mtptrain.UserError, match="prompt"):
        mtptrain.decode(backbone, prompts, settings=SIZES)


def test_settings_go_to_the_function_that_reads_them(backbone: mtptrain.LoadedBackbone, tmp_path: Path) -> None:
    with pytest.raises(mtptrain.UserError, match=r"train\.steps=3: is no setting of loading"):
        mtptrain.load_backbone(settings={"train.steps": 3})
    with pytest.raises(mtptrain.UserError, match="on_policy"):
        mtptrain.training_batches(backbone, settings={"data": "on_policy"})
    with pytest.raises(mtptrain.UserError, match="does not read it"):
        mtptrain.evaluate(backbone, output_dir=tmp_path / "run", settings={"train.steps": 3})
    with pytest.raises(mtptrain.UserError, match=r"checkpoints=all: evaluate returns the figures of one head"):
        mtptrain.evaluate(backbone, tmp_path, output_dir=tmp_path / "run", settings={"checkpoints": "all"})
    with pytest.raises(mtptrain.UserError, match="recipe=generate: shows text and writes no folder"):
        mtptrain.run_recipe("generate", backbone, settings={"checkpoint": "stock", "prompt": "The river"})
    assert not (tmp_path / "run").exists()


def test_a_report_from_python_returns_the_folder_of_its_page(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_bytes(EVALUATIONS["single"].read_bytes())
    assert mtptrain.run_recipe("report", settings={"path": tmp_path / "evaluation.json"}) == tmp_path
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("checkpoint", ["stock", "trained"])
def test_a_head_of_another_backbone_is_refused(
    backbone: mtptrain.LoadedBackbone, run: mtptrain.TrainedRun, checkpoint: str, tmp_path: Path
) -> None:
    head = run.head if checkpoint == "trained" else mtptrain.load_head(backbone)
    other = replace(backbone, loaded=replace(backbone.loaded, fingerprint="0" * 64))
    for work in (lambda: mtptrain.decode(other, "The river", head), lambda: mtptrain.evaluate(other, head)):
        with pytest.raises(mtptrain.UserError, match=r"head=.*: is a head of another backbone; give"):
            work()


def test_what_a_function_cannot_return_or_use_is_refused_before_the_work(
    backbone: mtptrain.LoadedBackbone, run: mtptrain.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mtptrain.UserError, match=r"checkpoints=all: evaluate returns the figures of one head"):
        mtptrain.evaluate(backbone, run.folder, settings={"checkpoints": "all"})
    for recipe, settings in (("report", {"path": run.folder}), ("plan", {}), ("backbone", {})):
        with pytest.raises(mtptrain.UserError, match=f"backbone: .recipe={recipe} loads none; leave"):
            mtptrain.run_recipe(recipe, backbone, settings=settings)
    assert not list(tmp_path.iterdir())
