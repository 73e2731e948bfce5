"""The start of a head's modules: a stored head, new weights, or a layer of the backbone."""

from pathlib import Path

import pytest
import torch

from mtptrain.backbone.load import Backbone, load_backbone
from mtptrain.backbone.streams import backbone_streams
from mtptrain.config import BackboneConfig, MtpConfig, MtpMode
from mtptrain.errors import UserError
from mtptrain.mtp.stack import head_digest
from mtptrain.mtp.start import describe_start, initial_stack, stack_from_backbone, stock_tensors
from mtptrain.mtp.tensors import HeldTensors
from tests.tiny import random_backbone, random_batch, random_stack


@pytest.fixture(scope="module")
def backbone(release_folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(release_folder)), torch.device("cpu"), torch.float32)


def stacked(depth: int, init: str = "some/checkpoint") -> MtpConfig:
    return MtpConfig(mode=MtpMode.stacked, depth=depth, init=init)


def test_missing_depths_start_as_the_last_one_present(backbone: Backbone) -> None:
    stored = random_stack(backbone.model, depth=2).state_dict()
    state = initial_stack(stacked(4), backbone, HeldTensors(stored), 0).state_dict()
    for name, tensor in state.items():
        _, depth, rest = name.split(".", 2)
        assert torch.equal(tensor, stored[f"mtp.{min(int(depth), 1)}.{rest}"])
    start = describe_start(stacked(4), stored)
    assert start == {"init": "some/checkpoint", "modules": 2, "conversion": "modules 2..3 start as copies of module 1"}


def test_shared_takes_the_first_of_stacked_modules(backbone: Backbone) -> None:
    stored = random_stack(backbone.model, depth=3).state_dict()
    state = initial_stack(MtpConfig(init="x"), backbone, HeldTensors(stored), 0).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert describe_start(MtpConfig(init="x"), stored)["conversion"] == "modules 0..0 of 3 were kept"


def test_a_start_without_conversion_records_none(backbone: Backbone) -> None:
    assert describe_start(MtpConfig(), stock_tensors(backbone)) == {"init": "stock", "modules": 1}
    assert describe_start(MtpConfig(init="fresh"), None) == {"init": "fresh"}


def test_modules_from_the_backbone_hold_its_last_sliding_layer(backbone: Backbone) -> None:
    model = backbone.model
    stack = stack_from_backbone(model, 2)
    layer = model.model.layers[3].state_dict()
    for block in stack.mtp:
        state = block.state_dict()
        assert all(torch.equal(state[f"layer.{name}"], tensor) for name, tensor in layer.items())
        assert torch.equal(state["norm.weight"], model.model.norm.weight)
        assert torch.equal(state["hc_head.hc_fn"], model.model.hc_head.hc_fn)


def test_a_hash_layer_provides_everything_except_a_router_bias() -> None:
    model = random_backbone(layer_types=["sliding_attention"], num_hidden_layers=1, mlp_layer_types=["hash_moe"])
    state = stack_from_backbone(model, 1).state_dict()
    assert torch.equal(state["mtp.0.layer.mlp.gate.weight"], model.model.layers[0].mlp.gate.weight)
    assert not state["mtp.0.layer.mlp.gate.e_score_correction_bias"].any()


def test_a_module_from_the_backbone_passes_state_and_token_through_at_the_size_of_embeddings(
    backbone: Backbone,
) -> None:
    model = backbone.model
    block = stack_from_backbone(model, 1).mtp[0]
    batch = random_batch(97, [[20]], 20)
    streams_BSND, _ = backbone_streams(model, batch)
    embedding_BSD = model.model.embed_tokens(batch.tokens_BS)
    size = model.model.embed_tokens.weight.pow(2).mean().sqrt()
    state_BSND = block.combine(torch.zeros_like(embedding_BSD), streams_BSND)
    direction = torch.nn.functional.cosine_similarity(state_BSND, streams_BSND, dim=-1)
    assert torch.allclose(direction, torch.ones_like(direction), atol=1e-5)  # fp32 rounding of sums over D = 64
    assert torch.allclose(state_BSND.pow(2).mean(-1).sqrt(), size.expand(1, 20, 2), rtol=1e-3)  # eps of the norm
    token_BSND = block.combine(embedding_BSD, torch.zeros_like(streams_BSND))
    assert torch.allclose(token_BSND.pow(2).mean(-1).sqrt(), size.expand(1, 20, 2), rtol=1e-3)


def test_a_backbone_without_sliding_layers_is_explained() -> None:
    kinds = ["heavily_compressed_attention"] * 4
    with pytest.raises(
        UserError, match=r"mtp\.init=backbone: this backbone has no sliding-window layer .*mtp\.init=fresh"
    ):
        stack_from_backbone(random_backbone(layer_types=kinds), 1)


def test_a_digest_depends_on_the_values_of_a_head_only() -> None:
    state = random_stack(random_backbone()).state_dict()
    assert head_digest({name: tensor.bfloat16().float() for name, tensor in state.items()}) == head_digest(
        {name: tensor.bfloat16() for name, tensor in reversed(state.items())}
    )
    name = next(iter(state))
    assert head_digest({**state, name: state[name] * 2}) != head_digest(state)
    assert head_digest({"a": torch.tensor([0.0])}) == head_digest({"a": torch.tensor([-0.0])})
