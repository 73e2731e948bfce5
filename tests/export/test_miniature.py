"""Random miniature releases with sizes for the kernels of servers."""

import json
from pathlib import Path

import pytest
import torch

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig, StoredWeights
from mtptrain.release.shards import Shards
from tests.command import run_main

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["release", "base"])
def servable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A servable miniature of each storage of experts."""
    folder = tmp_path_factory.mktemp("servable") / "R"
    settings = ["release.random=true", "release.size=servable", f"release.variant={request.param}"]
    assert run_main("+recipe=mini_release", *settings, f"output_dir={folder}") == 0
    return folder


def test_every_quantised_matrix_of_a_servable_miniature_has_whole_blocks(servable: Path) -> None:
    entries = Shards(servable, "R").entries
    scales = {name: entry.shape for name, entry in entries.items() if name.endswith(".scale")}
    assert len(scales) > 100
    for name, scale_shape in scales.items():
        weight = entries[name.removesuffix("scale") + "weight"]
        is_fp4 = weight.dtype == "I8"
        rows, columns = weight.shape[0], weight.shape[1] * (2 if is_fp4 else 1)
        assert (rows % 128, columns % 128) == (0, 0), name
        assert scale_shape == ((rows, columns // 32) if is_fp4 else (rows // 128, columns // 128)), name


def test_a_servable_miniature_states_its_layers_as_releases_do(servable: Path) -> None:
    config = json.loads((servable / "config.json").read_text(encoding="utf-8"))
    assert config["compress_ratios"] == [0, 4, 128, 0, 0]
    assert not {"layer_types", "compress_rates"} & config.keys()


def test_kept_and_decoded_weights_of_a_servable_miniature_give_equal_logits(servable: Path) -> None:
    kept, decoded = (
        load_backbone(BackboneConfig(path=str(servable), weights=weights), CPU, torch.float32).model
        for weights in (StoredWeights.keep, StoredWeights.dequantize)
    )
    tokens_BS = torch.arange(300).view(2, 150)
    with torch.no_grad():
        assert torch.equal(kept(tokens_BS, use_cache=False).logits, decoded(tokens_BS, use_cache=False).logits)
