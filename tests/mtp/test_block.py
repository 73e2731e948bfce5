"""The MTP block against a plain-torch transcription of the official formula."""

# S tokens, H heads, C head width

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtptrain.config import MtpConfig
from mtptrain.errors import UserError
from mtptrain.kernels.sink_attention import rollout_attention
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import stack_from_tensors
from tests.mtp.plain_block import attend, collapse, project, queries_and_keys, run_layer
from tests.tiny import random_backbone, random_stack


def attention(block: MtpBlock, x: Tensor, positions: Tensor) -> Tensor:
    """Causal sliding attention over one document."""
    query, key = queries_and_keys(block, x, positions)
    first = [max(0, i - block.layer.self_attn.config.sliding_window + 1) for i in range(len(x))]
    outputs = [attend(block, query[i], key[first[i] : i + 1]) for i in range(len(x))]
    return project(block, torch.stack(outputs), positions)


@pytest.mark.parametrize("length", [1, 7, 21])
def test_block_equals_a_transcription_of_the_official_formula(length: int) -> None:
    model = random_backbone()
    block = random_stack(model).block(1)
    generator = torch.Generator().manual_seed(length)
    embedding = torch.randn(length, model.config.hidden_size, generator=generator)
    state = torch.randn(length, model.config.hc_mult, model.config.hidden_size, generator=generator)
    positions = torch.arange(length)

    def attend_rows(query_BHSC: Tensor, key_BSC: Tensor, turn_BSr: Tensor) -> Tensor:
        module, start_BS = block.layer.self_attn, torch.zeros(1, length, dtype=torch.int64)
        return rollout_attention(
            query_BHSC, key_BSC, None, module.sinks, start_BS, turn_BSr, window=block.window, scale=module.scaling
        )

    with torch.no_grad():
        ours = block(embedding[None], state[None], positions[None], attend_rows)
        state_expected = run_layer(block, embedding, state, lambda x: attention(block, x, positions))
        # Two orders of fp32 sums over a layer whose activations are of order 10.
        torch.testing.assert_close(ours[0], state_expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(block.hidden(ours)[0], collapse(block, state_expected), atol=2e-4, rtol=2e-4)


def test_missing_depths_start_as_copies_of_the_last_one() -> None:
    model = random_backbone()
    tensors = random_stack(model, depth=1).state_dict()
    grown = stack_from_tensors(model.config, 3, tensors, "test")
    for depth in (1, 2):
        for name, tensor in grown.mtp[depth].state_dict().items():
            assert torch.equal(tensor, tensors[f"mtp.0.{name}"])
    grown.mtp[1].e_proj.weight.data.zero_()
    assert grown.mtp[2].e_proj.weight.any(), "copies must not share storage"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_head_that_does_not_fit_is_refused(damage: str) -> None:
    model = random_backbone()
    tensors = dict(random_stack(model).state_dict())
    if damage == "missing":
        del tensors["mtp.0.enorm.weight"]
    elif damage == "unexpected":
        tensors["mtp.0.markov_head.weight"] = torch.zeros(1)
    else:
        tensors["mtp.0.e_proj.weight"] = tensors["mtp.0.e_proj.weight"][:-1]
    with pytest.raises(UserError, match=r"enorm|markov_head|e_proj"):
        stack_from_tensors(model.config, 1, tensors, "test")


def test_heads_survive_a_round_trip_through_a_file(tmp_path) -> None:  # noqa: ANN001
    model = random_backbone()
    stack = random_stack(model, depth=2)
    before = copy.deepcopy(stack.state_dict())
    save_file(stack.state_dict(), tmp_path / "mtp.safetensors")
    loaded = stack_from_tensors(model.config, 2, load_file(tmp_path / "mtp.safetensors"), "test")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_shared_mode_rejects_a_second_module() -> None:
    with pytest.raises(UserError, match=r"mtp\.depth=2.*mtp\.mode=stacked"):
        MtpConfig(depth=2)
