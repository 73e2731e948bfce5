"""Training from mixtures and streams, through the command line."""

import json
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mtptrain.training.checkpoint import checkpoint_folders
from tests.command import Refused, read_metrics, run_main, start_process
from tests.conftest import CHAT_TEMPLATE, corpus_texts
from tests.recipes.test_recipes import check_evaluation, check_training

STEPS = 24


@pytest.fixture(scope="module")
def mixture(light: list[str], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a distillation on three parts of text and one of conversations."""
    folder = tmp_path_factory.mktemp("mixture")
    turns = [("user", "Go on."), ("assistant", corpus_texts()[0])]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "talk.jsonl").write_text((json.dumps(talk) + "\n") * 20, encoding="utf-8")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    sources = f"{{name:text,path:{corpus_file},weight:3}},{{path:{folder}/talk.jsonl,field_name:messages}}"
    return [
        "+recipe=distill",
        *light,
        "data.path=null",
        f"data.mixture=[{sources}]",
        f"data.chat_template={folder}/chat.jinja",
        f"train.steps={STEPS}",
        "train.checkpoint_every=3",
        "evaluate_at_end=false",
    ]


def test_a_mixture_whose_reader_is_killed_continues_to_the_same_bits(mixture: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start_process(*mixture, f"output_dir={killed}", folder=tmp_path)
    deadline = time.monotonic() + 120
    while not checkpoint_folders(killed / "checkpoints"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for reader in psutil.Process(process.pid).children():
        reader.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("mtptrain:")]
    assert len(lines) == 1
    assert "data.workers=1: a process that reads and tokenises was killed" in lines[0]
    assert "Traceback" not in errors
    assert not (killed / "checkpoints" / f"step_{STEPS:08d}").exists()

    assert run_main(*mixture, f"output_dir={killed}", "resume=auto") == 0
    assert run_main(*mixture, f"output_dir={whole}", "data.workers=0") == 0
    left, right = (
        load_file(checkpoint_folders(run / "checkpoints")[-1] / "module.safetensors") for run in (killed, whole)
    )
    assert all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())
    last, other = read_metrics(killed)[-1], read_metrics(whole)[-1]
    counted = {"tokens", "tokens/text", "tokens/talk", "share/text", "share/talk"}
    assert {name: last[name] for name in counted} == {name: other[name] for name in counted}
    assert last["tokens/text"] + last["tokens/talk"] == last["tokens"]
    assert 0.6 < last["share/text"] < 0.9  # three parts of four, of 48 rows that are filled as documents allow


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["data.mixture=[{path:x.jsonl}]"], "data.path=KEPT: data.mixture brings its own sources"),
        (["data.mixture=[{path:x.jsonl,weight:0}]"], "data.mixture.x.weight=0.0: must be above 0"),
        (["data.mixture=[{weight:2}]"], "data.mixture.text.path=null: a source of text needs"),
        (["data.mixture=[{source:streams}]"], "data.mixture.streams.source=streams: a mixture is of"),
        (["data=streams", "data.mixture=[{path:x.jsonl}]"], "data=streams: data.mixture brings its own sources, of"),
        (["data.mixture=[{path:a/x},{path:b/x.jsonl}]"], "data.mixture=[x,x]: sources need names of their own"),
        (["data.mixture=[{wieght:2}]"], "data.mixture: its parts have no wieght; did you mean weight?"),
        (["data.streaming=true", "data.workers=-1"], "data.workers=-1: must not be negative"),
        (["data.streaming=true", "train.batch_size=99"], "training documents, and read as a stream each of"),
    ],
)
def test_a_wrong_mixture_or_stream_is_refused(
    arguments: list[str], reason: str, corpus_file: Path, refused: Refused
) -> None:
    given = [f"data.path={corpus_file}"] if "KEPT" in reason else ["data.path=null"]
    path = [] if "data.streaming=true" in arguments else given
    assert reason.replace("KEPT", str(corpus_file)) in refused(*path, *arguments)


@pytest.mark.parametrize("recipe", ["collect", "backbone"])
def test_what_reads_a_text_once_takes_no_mixture(recipe: str, refused: Refused) -> None:
    line = refused("data.path=null", "data.mixture=[{path:a.jsonl}]", recipe=recipe)
    assert line.startswith("data.mixture=[a]: weighs the training text of heads")


@pytest.mark.parametrize("begun", ["true", "false"])
def test_a_stream_is_continued_as_a_stream_of_as_many_rows(
    begun: str, light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={tmp_path}"]
    assert run_main(*settings, f"data.streaming={begun}") == 0
    other = "false" if begun == "true" else "true"
    changes = {f"data.streaming={other}": f"data.streaming {begun} -> {other}; set them back, or choose another output"}
    if begun == "true":
        changes["train.batch_size=3"] = "train.batch_size=3: the interrupted run read its data as a stream with 2"
    for change, reason in changes.items():
        more = [change, "resume=auto", "train.steps=4", "resume_allow=[train.steps,train.batch_size]"]
        assert run_main(*settings, f"data.streaming={begun}", *more) == 2
        assert reason in capfd.readouterr().err.splitlines()[-1]


def test_streamed_text_is_trained_on(light: list[str], tmp_path: Path) -> None:
    assert run_main("+recipe=distill", *light, "data.streaming=true", f"output_dir={tmp_path}") == 0
    check_training(tmp_path)
    check_evaluation(tmp_path, ["stock", "trained"])
