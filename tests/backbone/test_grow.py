"""A deeper backbone that begins with the weights of a shallower one, and backbones stored in bf16."""

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.build import build_model, model_config
from mtptrain.backbone.grow import grow, layer_positions
from mtptrain.backbone.load import load_backbone
from mtptrain.backbone.stored import save_bf16
from mtptrain.config import BackboneConfig, ShapeConfig
from mtptrain.errors import UserError

CPU = torch.device("cpu")
DEEPER = ["sliding", "sliding", "csa", "hca", "csa", "hca", "sliding"]


def test_a_deeper_backbone_begins_as_the_shallower_one() -> None:
    smaller = load_backbone(BackboneConfig(), CPU, torch.float32).model
    model = build_model(ShapeConfig(layer_types=DEEPER), 0, CPU).eval()
    tokens_BS = torch.tensor([[0, *b"def grow(model, smaller):"]])

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (m(tokens_BS, use_cache=False).logits.softmax(-1) for m in (model, smaller))
        return (ours - theirs).abs().sum(-1).mean().item() / 2

    assert distance() > 0.5
    grow(model, smaller)
    assert distance() < 0.01
    assert torch.equal(model.model.layers[6].input_layernorm.weight, smaller.model.layers[3].input_layernorm.weight)


def test_layers_take_the_first_position_of_their_kind() -> None:
    smaller, deeper = model_config(ShapeConfig()), model_config(ShapeConfig(layer_types=DEEPER))
    assert layer_positions(smaller, deeper) == [0, 2, 3, 6]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ShapeConfig(layer_types=["sliding", "hca", "csa", "sliding"]), r"must contain the layers .* in their order"),
        (ShapeConfig(layer_types=DEEPER, num_hash_layers=0), r"must contain .* sliding_attention with hash_moe"),
        (
            ShapeConfig(layer_types=DEEPER, hidden_size=64),
            r"gives hidden_size=64, backbone.grow_from has 128; only the",
        ),
    ],
)
def test_a_shape_that_the_smaller_backbone_does_not_fit_is_refused(shape: ShapeConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_positions(model_config(ShapeConfig()), model_config(shape))


def test_a_backbone_stored_in_bf16_computes_in_float32(tmp_path: Path) -> None:
    model = build_model(ShapeConfig(layer_types=["sliding", "csa"]), 0, CPU)
    whole = sum(p.numel() * 4 for p in model.parameters())
    save_bf16(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * whole
    loaded = DeepseekV4ForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
