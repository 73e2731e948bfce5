"""Fixtures of the tests of whole runs: a random backbone on disk, a small corpus, and settings that fit both."""

# ruff: noqa: E402 (the environment is set before anything imports torch or a Hugging Face package: they read it once)

import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

gc.disable()  # until all tests are imported: collections would visit a million objects that stay
_CACHE = tempfile.TemporaryDirectory(prefix="mtptrain-tests-")
os.environ |= {
    "XDG_CACHE_HOME": _CACHE.name,
    "HF_HOME": f"{_CACHE.name}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MPLCONFIGDIR": f"{_CACHE.name}/matplotlib",
}

import torch

if not torch.cuda.is_available():  # tests of kernels call the Triton functions, interpreted without a GPU
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from safetensors.torch import save_file

from mtptrain.config import ReleaseVariant
from mtptrain.data.tokenizer import save_tokenizer, train_tokenizer
from mtptrain.export.folder import write_shards
from mtptrain.export.miniature import miniature_config, miniature_groups
from mtptrain.run.storage import write_json
from tests.command import SMALL, Light, Refused, run_main
from tests.tiny import random_backbone, random_stack

torch.set_num_threads(1)
gc.set_threshold(100_000, 50, 50)
os.fsync = lambda descriptor: None  # waits for the disk at every file; what a test writes need not outlast a power cut

VOCAB_SIZE = 300  # 256 bytes, two bos_eos and a few merges
SUBJECTS = ["The river", "A small engine", "Every reader", "The old library", "Our teacher", "This proof"]
VERBS = ["follows", "carries", "answers", "measures", "repeats"]
OBJECTS = ["the long road", "a simple rule", "what was written", "nothing at all", "two equal parts"]


CHAT_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<' + message.role + '>' + message.content + '</' + message.role + '>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def corpus_texts() -> list[str]:
    """Return sixty short documents, alternately English and Python."""
    texts = []
    for number in range(60):
        subject, verb, thing = SUBJECTS[number % 6], VERBS[number % 5], OBJECTS[number * 7 % 5]
        if number % 2:
            texts.append(f"def rule_{number}(x: int) -> int:\n    return x * {number} + {number % 7}  # {thing}\n")
        else:
            texts.append(f"{subject} {verb} {thing}, and chapter {number} of the book {verb} it once more.\n")
    return texts


BOS_EOS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "sliding_window": 16, "bos_token_id": 0, "eos_token_id": 1}
THREE_LAYERS: dict[str, Any] = {  # one of each kind; `mtp.init=backbone` needs a sliding window with a learned router
    "num_hidden_layers": 3,
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "hc_sinkhorn_iters": 2,
}


def save_backbone(folder: Path, **overrides: object) -> None:
    """Write a random backbone with a byte-level tokenizer and a stock head, for `backbone.path`."""
    model = random_backbone(**{**BOS_EOS, **THREE_LAYERS, **overrides})
    model.save_pretrained(folder)
    save_tokenizer(train_tokenizer(corpus_texts(), VOCAB_SIZE), folder)
    save_file(random_stack(model).state_dict(), folder / "mtp.safetensors")


LONG = ("recipes/test_matrix.py", "training/test_engines.py", "test_launchers.py", "recipes/test_other_node.py")


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but not among modules and tests."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait for processes: the other workers take short ones meanwhile, to the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random backbone; do not write into it."""
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(folder)
    return folder


def save_release(folder: Path, variant: ReleaseVariant = ReleaseVariant.release, **overrides: object) -> None:
    """Write a random backbone and head in the official release format, with the same tokenizer."""
    model = random_backbone(**{**BOS_EOS, **overrides})
    folder.mkdir()
    write_shards(folder, miniature_groups(model, random_stack(model).state_dict(), variant))
    write_json(folder / "config.json", miniature_config(model.config, variant, 1))
    save_tokenizer(train_tokenizer(corpus_texts(), VOCAB_SIZE), folder)


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature release with FP4 experts; do not write into it."""
    folder = tmp_path_factory.mktemp("release") / "R"
    save_release(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents in the column `text` of a .jsonl file; do not write to it."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def light(backbone_folder: Path, corpus_file: Path) -> list[str]:
    """Return settings that keep a recipe on the random backbone to about a second: two steps, two prompts."""
    settings = [
        f"backbone.path={backbone_folder}",
        "data=text",
        f"data.path={corpus_file}",
        *SMALL,
        "train.steps=2",
        "train.batch_size=2",
        "train.log_every=1",
        "train.checkpoint_every=1",
        "evaluation.every=0",
    ]
    return [Light(setting) for setting in settings]


@pytest.fixture
def refused(light: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a failing command and returns its line, the only one; the command leaves no file."""

    def run(*arguments: str, recipe: str = "distill") -> str:
        folder = tmp_path / "run"
        assert run_main(f"+recipe={recipe}", *light, Light(f"output_dir={folder}"), *arguments) == 2
        output, errors = capfd.readouterr()
        lines = errors.splitlines()
        assert [line for line in lines if line.startswith("mtptrain:")] == lines[-1:]
        assert "Traceback" not in errors + output
        assert not folder.exists()
        return lines[-1].removeprefix("mtptrain: ")

    return run
