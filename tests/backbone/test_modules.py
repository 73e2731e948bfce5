"""Our replacements for modules of transformers' layers give its results."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4RMSNorm,
    DeepseekV4UnweightedRMSNorm,
)

from mtptrain.backbone import modules
from mtptrain.backbone.modules import Experts, replace_experts, replace_norms
from tests.tiny import random_backbone


def routed_experts() -> DeepseekV4Experts:
    """The routed experts of a random layer, as transformers builds them."""
    experts = copy.deepcopy(random_backbone().model.layers[1].mlp.experts)
    experts.__class__ = DeepseekV4Experts
    return experts


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_all_experts_at_once_give_what_grouped_ones_give(num_tokens: int) -> None:
    theirs = routed_experts()
    ours = copy.deepcopy(theirs)
    replace_experts(ours)
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, 64, generator=generator) * 4
    index_Tk = torch.rand(num_tokens, 4, generator=generator).topk(2).indices
    weights_Tk = torch.rand(num_tokens, 2, generator=generator)
    with torch.no_grad():
        expected = theirs(hidden_TD, index_Tk, weights_Tk)
        error = (ours(hidden_TD, index_Tk, weights_Tk) - expected).norm() / expected.norm()
    assert error < 16 * 2**-24  # sums of 64 and 32 products in another order


def test_experts_of_a_real_size_and_with_gradients_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(DeepseekV4Experts, "forward", lambda self, hidden, *_: calls.append(1) or hidden)
    ours = routed_experts()
    replace_experts(ours)
    assert isinstance(ours, Experts)
    arguments = (torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    ours(*arguments)
    with torch.no_grad():
        ours(*arguments)
        assert len(calls) == 1
        monkeypatch.setattr(modules, "MOST_WEIGHTS", 1000)
        ours(*arguments)
        assert len(calls) == 2
        monkeypatch.undo()
        monkeypatch.setattr(DeepseekV4Experts, "forward", lambda self, hidden, *_: calls.append(1) or hidden)
        monkeypatch.setattr(modules, "MOST_PRODUCTS", 1000)
        ours(*arguments)
    assert len(calls) == 3


@pytest.mark.parametrize("theirs", [DeepseekV4RMSNorm(96), DeepseekV4UnweightedRMSNorm()], ids=["weighted", "bare"])
def test_a_norm_in_one_call_has_the_same_bits(theirs: nn.Module) -> None:
    for weight in theirs.parameters():
        nn.init.uniform_(weight, 0.5, 1.5)
    ours = nn.Sequential(copy.deepcopy(theirs))
    replace_norms(ours)
    assert type(ours[0]) is not type(theirs)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype is torch.bfloat16
