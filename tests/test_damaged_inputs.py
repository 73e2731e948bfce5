"""Texts, backbones and checkpoints that are damaged, or not what they should be, are named in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtptrain.data.tokenizer import save_tokenizer, train_tokenizer
from tests.command import Refused, run_main
from tests.conftest import corpus_texts, save_backbone

# The text


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("absent.jsonl", None, "cannot be read .*check the path"),
        ("absent", None, "datasets cannot load it .*check the file, or the name"),
        ("latin.txt", b"caf\xe9 au lait", "is not UTF-8 text .*convert it"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 .*convert it"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON .*mend or drop it"),
        ("list.jsonl", b'["text"]\n', "line 1 is not a JSON object; write one object a line"),
        ("empty.txt", b"", "no document on the .* side; .*give more documents"),
        ("empty.jsonl", b"\n", "no document on the .* side; .*give more documents"),
        ("table.pdf", b"text\na\n", "a file must end in .txt, .jsonl, .json, .csv, .parquet, .*; convert or rename it"),
        ("table.parquet", b"PAR1", "datasets cannot load it .*check the file"),
    ],
)
def test_text_that_cannot_be_read_is_named(
    name: str, content: bytes | None, line: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refused(f"data.path={path}")
    assert message.startswith(f"data.path={path}: ")
    assert re.search(line, message)


def test_an_empty_folder_of_text_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(f"data.path={tmp_path}/empty")
    assert re.match(
        rf"data.path={tmp_path}/empty: the folder holds no .txt, .jsonl, .json, .csv, .parquet file; give", line
    )


def test_a_missing_column_is_answered_with_the_existing_ones(refused: Refused) -> None:
    assert re.match(
        r"data.field_name=body: .*row 1 .* has \['text'\]; set data.field_name", refused("data.field_name=body")
    )


def test_a_cache_that_cannot_be_written_is_named(corpus_file: Path, refused: Refused) -> None:
    assert re.match(rf"data.cache_dir={corpus_file}/x: cannot be written", refused(f"data.cache_dir={corpus_file}/x"))


# The backbone


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BACKBONE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json; give the folder"),
    "broken_config": (lambda folder: cut(folder / "config.json"), "config.json cannot be read .*restore it"),
    "wrong_type": (
        lambda folder: edit_config(folder, hidden_size="64"),
        "config.json is not DeepSeek-V4's .*hidden_size",
    ),
    "cut_weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read .*incomplete"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded .*model.safetensors"),
    "other_width": (
        lambda folder: edit_config(folder, hidden_size=32),
        "mismatched keys, e.g. .*do not belong together",
    ),
    "other_model": (
        lambda folder: edit_config(folder, tie_word_embeddings=True, n_routed_experts=3),
        "mismatched keys",
    ),
    "no_tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json; put"),
    "broken_tokenizer": (lambda folder: cut(folder / "tokenizer.json"), "tokenizer.json cannot be read"),
    "large_tokenizer": (
        lambda folder: save_tokenizer(train_tokenizer(corpus_texts(), 310), folder),
        "the tokenizer has 310 tokens and the backbone's embedding 300; use the tokenizer",
    ),
    "no_head": (lambda folder: (folder / "mtp.safetensors").unlink(), "holds no stock head .*mtp.init=fresh"),
    "cut_head": (lambda folder: cut(folder / "mtp.safetensors"), "mtp.safetensors cannot be read .*restore the file"),
}


@pytest.mark.parametrize("damage", BACKBONE_DAMAGE)
def test_a_damaged_backbone_is_named(damage: str, backbone_folder: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(backbone_folder, folder)
    act, line = BACKBONE_DAMAGE[damage]
    act(folder)
    message = refused(f"backbone.path={folder}")
    assert message.startswith(f"backbone.path={folder}: ")
    assert re.search(line, message)


def test_a_backbone_without_stock_head_has_none_to_evaluate(
    backbone_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(backbone_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("mtp.*"))
    line = refused(f"backbone.path={tmp_path}/bare", "checkpoint=stock", recipe="evaluate")
    assert re.match(r"backbone.path=.*bare: holds no stock head .*give a checkpoint's path", line)


def test_a_preset_that_is_not_shipped_needs_a_path(refused: Refused) -> None:
    line = refused("backbone=small", "backbone.path=null")
    assert re.match(r"backbone=small: is not shipped; train it with .*set backbone.path", line)


@pytest.mark.parametrize(("recipe", "setting"), [("distill", "mtp.steps=4"), ("evaluate", "decoding.draft_length=4")])
def test_a_draft_as_long_as_the_window_is_refused(recipe: str, setting: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "narrow").mkdir()
    save_backbone(tmp_path / "narrow", sliding_window=4)
    head = ["checkpoint=stock"] if recipe == "evaluate" else []
    line = refused(f"backbone.path={tmp_path}/narrow", setting, *head, recipe=recipe)
    assert setting in line
    assert "must be shorter than the backbone's sliding window of 4 tokens" in line


# Checkpoints


@pytest.fixture(scope="module")
def trained(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; nothing may write into it."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_main("+recipe=distill", *light, "evaluate_at_end=false", f"output_dir={folder}") == 0
    return folder


@pytest.mark.parametrize("recipe", ["evaluate", "distill"])
@pytest.mark.parametrize("file", ["module.safetensors", "optimizer.safetensors", "random.pt", "checkpoint.json"])
def test_a_truncated_checkpoint_is_named(
    file: str, recipe: str, trained: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "step_00000002"
    shutil.copytree(trained / "checkpoints" / folder.name, folder)
    cut(folder / file)
    line = refused(f"{'checkpoint' if recipe == 'evaluate' else 'mtp.init'}={folder}", recipe=recipe)
    assert re.search(rf"checkpoint={folder}: {file} is .*use an older checkpoint", line)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path, refused: Refused) -> None:
    line = refused(f"checkpoint={tmp_path}/absent", recipe="evaluate")
    assert line.startswith(f"checkpoint={tmp_path}/absent: no checkpoint there; give a run folder")
    assert refused("mtp.init=absent").startswith("mtp.init=absent: ")


def test_a_head_of_another_backbone_is_refused(trained: Path, tmp_path: Path, refused: Refused) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_backbone(other, index_topk=2)
    line = refused(f"backbone.path={other}", f"checkpoint={trained}", recipe="evaluate")
    assert re.match(
        rf"checkpoint={trained}/.*: holds backbone=.* and this run has backbone=.*; set backbone or backbone.path", line
    )
    line = refused(f"backbone.path={other}", f"mtp.init={trained}")
    assert re.match(
        rf"mtp.init={trained}: checkpoint=.* holds backbone=.* and this run has .*; set backbone or backbone.path", line
    )
