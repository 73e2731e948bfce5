"""`collect.engine=vllm` around a stand-in for vLLM; nothing here runs vLLM."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtptrain.config import StreamFormat
from mtptrain.config.reads import ALWAYS
from mtptrain.data.tokens import TokenizedCorpus
from mtptrain.hidden_cache import fidelity, vllm_engine
from mtptrain.hidden_cache.format import shard_file
from mtptrain.hidden_cache.manifest import open_cache
from mtptrain.hidden_cache.vllm_engine import VLLM, VllmEngine
from mtptrain.hidden_cache.writer import piece_streams, write_shard
from mtptrain.recipes import find_recipe
from mtptrain.run.storage import clear_leftovers
from tests.command import Refused, run_main, tree
from tests.hidden_cache.vllm_stand_in import StandIn, install
from tests.reads import recorded_reads
from tests.recipes.test_reads import RARELY_READ, READ_WITHOUT_EFFECT
from tests.tiny import random_backbone

VLLM_ENGINE = "collect.engine=vllm"
SAMPLING = SimpleNamespace(**vllm_engine.SAMPLING)


def corpus(*sizes: int) -> TokenizedCorpus:
    tokens = np.random.default_rng(0).integers(0, 60, sum(sizes)).astype(np.int32)
    return TokenizedCorpus(tokens, np.cumsum([0, *sizes]), 0)


@pytest.fixture
def few_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the engine on few documents; the next test compares on all."""
    monkeypatch.setattr(fidelity, "GATE_DOCUMENTS", 6)


def test_a_cache_of_vllm_has_the_form_and_the_streams_of_one_of_transformers(
    light: list[str], release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"backbone.path={release_folder}"
    settings = [*light, path, "data.chat_template=builtin", "collect.shard_tokens=300"]
    assert run_main("+recipe=collect", *settings, f"output_dir={tmp_path / 'plain'}") == 0
    opened = install(monkeypatch)
    with recorded_reads() as reads:
        assert run_main("+recipe=collect", *settings, VLLM_ENGINE, f"output_dir={tmp_path / 'served'}") == 0
    assert (opened[0]["tensor_parallel_size"], opened[0]["max_num_batched_tokens"]) == (2, 2048)
    plain, served = open_cache(tmp_path / "plain"), open_cache(tmp_path / "served")
    assert list(plain.files) == list(served.files)
    for file, stored in served.files.items():
        expected, found = load_file(plain.folder / file), load_file(served.folder / file)
        assert stored.counts == plain.files[file].counts
        # bf16 rounding; pieces are padded differently
        torch.testing.assert_close(found.pop("streams"), expected.pop("streams"), rtol=2**-7, atol=1e-4)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[part], expected[part]) for part in expected)
    measured = served.content.fidelity
    assert measured is not None
    assert plain.content.fidelity is None
    assert (measured.engine, served.identity.engine.value) == (f"vLLM {VLLM}", "vllm")
    assert measured.documents == min(64, served.content.documents)
    assert measured.cosine > 0.9999
    assert measured.kl < 1e-3

    assert reads.config is not None
    declared = find_recipe("collect").reads(reads.config)
    assert declared - reads.names <= RARELY_READ | ALWAYS
    assert reads.names - declared <= READ_WITHOUT_EFFECT

    kept = [one for one in light if not one.startswith(("data=", "data.path="))]
    data = ["data=streams", f"data.path={tmp_path / 'served'}", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *kept, path, *data, f"output_dir={tmp_path / 'run'}") == 0


def test_a_loss_mask_reaches_the_shard(tmp_path: Path) -> None:
    model, text = random_backbone(), corpus(6, 9, 20)
    text = replace(text, loss_mask=np.arange(35) % 3 == 0)
    documents = [[(6, 9)], [(15, 12), (26, 9)]]  # pieces overlap by a token
    for folder in ("plain", "served"):
        (tmp_path / folder).mkdir()
    streams_TND = piece_streams(model, text, [piece for parts in documents for piece in parts], 32)
    write_shard(tmp_path / "plain", 3, documents, text, streams_TND, StreamFormat.bf16)
    VllmEngine(StandIn(model), SAMPLING, model.config).write_shard(
        tmp_path / "served", 3, documents, text, StreamFormat.bf16
    )
    expected, found = (load_file(tmp_path / folder / shard_file(3)) for folder in ("plain", "served"))
    assert all(torch.equal(found[part], expected[part]) for part in expected if part != "streams")
    torch.testing.assert_close(found["streams"], expected["streams"], rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize(("fault", "figures"), [("shifted", ["cosine", "KL", "top-1"]), ("layer", ["cosine"])])
def test_wrong_streams_are_refused_before_the_cache_begins(
    fault: str, figures: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fault)
    line = refused(VLLM_ENGINE, recipe="collect")
    assert line.startswith(f"collect.engine=vllm: the streams of vLLM {VLLM} are not those of transformers on ")
    assert all(figure in line for figure in figures)
    assert "nan" not in line
    assert "set collect.engine=transformers, or other bounds" in line


@pytest.mark.usefixtures("few_compared")
def test_wider_bounds_let_an_engine_pass(light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "shifted")
    bounds = ["collect.min_cosine=-1", "collect.min_agreement=0", "collect.max_kl=99"]
    assert run_main("+recipe=collect", *light, VLLM_ENGINE, *bounds, f"output_dir={tmp_path / 'cache'}") == 0
    measured = open_cache(tmp_path / "cache").content.fidelity
    assert measured is not None
    assert measured.documents == 6
    assert measured.cosine < 0.99


def test_each_piece_has_the_streams_of_a_forward_of_its_own(tmp_path: Path) -> None:
    model, text = random_backbone(), corpus(9, 20)
    engine = VllmEngine(StandIn(model), SAMPLING, model.config)
    for piece in ((0, 9), (9, 20), (17, 5)):
        found, expected = engine.piece_streams(text, piece, tmp_path), piece_streams(model, text, [piece], 32)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)


def test_the_next_start_clears_a_piece_of_a_killed_comparison(tmp_path: Path) -> None:
    """The folder of the piece, made again here as if its run had been killed, is among those that a start clears."""
    model, text, written = random_backbone(), corpus(9), []

    class Recording(StandIn):
        def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
            written.extend([Path(args[0])] if method == "write_streams" else [])
            return super().collective_rpc(method, timeout, args)

    VllmEngine(Recording(model), SAMPLING, model.config).piece_streams(text, (0, 9), tmp_path)
    (folder,) = written
    assert not any(tmp_path.iterdir())
    folder.mkdir()
    (folder / shard_file(0)).touch()
    clear_leftovers(tmp_path)
    assert folder.parent == tmp_path
    assert not any(tmp_path.iterdir())


def test_a_piece_that_took_two_steps_is_noticed(tmp_path: Path) -> None:
    model, text = random_backbone(), corpus(20)
    with pytest.raises(RuntimeError, match="did not run all 20 tokens of a request in its last step"):
        VllmEngine(StandIn(model, "split"), SAMPLING, model.config).piece_streams(text, (0, 20), tmp_path)


def test_a_model_with_other_streams_is_noticed() -> None:
    model, other = random_backbone(), random_backbone(hc_mult=4)
    with pytest.raises(RuntimeError, match="vLLM's model has 128 channels a token, not 4 x 64"):
        VllmEngine(StandIn(model), SAMPLING, other.config)


@pytest.mark.parametrize(
    ("version", "gpus", "arguments", "line"),
    [
        (None, 2, "", f"collect.engine=vllm: vLLM is not installed; run: pip install vllm=={VLLM}, or set"),
        ("0.32.1", 2, "", f"collect.engine=vllm: vLLM 0.32.1 is installed, and {VLLM} keeps the streams; run: pip"),
        (VLLM, 0, "", "collect.engine=vllm: needs a GPU, and this machine has none; set collect.engine=transformers"),
        (VLLM, 2, "collect.tensor_parallel=4", "collect.tensor_parallel=4: this process sees 2 GPUs; set at most"),
        (VLLM, 3, "", "collect.tensor_parallel=3: must divide the backbone's 2 attention heads and 2 output groups"),
        (VLLM, 2, "data.sequence_length=9999", "data.sequence_length=.*: vLLM emits a token behind each piece"),
        (VLLM, 2, "backbone.placement=zero3", "backbone.placement=zero3: collect.engine=vllm runs in one process"),
    ],
)
def test_an_engine_that_cannot_run_here_is_refused_in_one_line(
    version: str,
    gpus: int,
    arguments: str,
    line: str,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, version=version)
    monkeypatch.setattr(vllm_engine, "visible_gpus", lambda: gpus)
    pattern, found = line.split(".*"), refused(VLLM_ENGINE, *arguments.split(), recipe="collect")
    assert found.startswith(pattern[0])
    assert pattern[-1] in found


def test_a_plan_needs_no_vllm(light: list[str], tmp_path: Path) -> None:
    assert run_main("+recipe=collect", "--plan", *light, VLLM_ENGINE, f"output_dir={tmp_path / 'cache'}") == 0


def test_one_cache_holds_streams_of_one_engine(
    light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*light, f"output_dir={tmp_path / 'cache'}", "precision=fp32"]
    assert run_main("+recipe=collect", *settings) == 0
    before = tree(tmp_path / "cache")
    install(monkeypatch)
    assert run_main("+recipe=collect", *settings, VLLM_ENGINE, "resume=auto") == 2
    assert "engine=transformers and this run has" in capfd.readouterr().err.splitlines()[-1]
    assert tree(tmp_path / "cache") == before


@pytest.mark.usefixtures("few_compared")
def test_an_interrupted_cache_in_fp8_continues_with_the_same_shards(
    light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    folder = tmp_path / "cache"
    settings = [*light, VLLM_ENGINE, "collect.format=fp8", "collect.shard_tokens=300", f"output_dir={folder}"]
    assert run_main("+recipe=collect", *settings) == 0
    whole = open_cache(folder)
    assert len(whole.files) > 1
    for name in ("manifest.json", shard_file(1), "shard_00001.json"):
        (folder / name).unlink()
    assert run_main("+recipe=collect", *settings, "resume=auto") == 0
    assert open_cache(folder) == whole
    assert "scales" in load_file(folder / shard_file(1))
