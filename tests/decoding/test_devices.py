"""All tensors are created on the backbone's device. Tensors without values stand in for GPU tensors, and mixing them
with CPU tensors fails."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.attention import use_linear_attention
from mtptrain.backbone.decode import run_step
from mtptrain.backbone.streams import run_backbone
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.draws import Draws
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache
from mtptrain.decoding.texts import Texts, verify
from mtptrain.mtp.stack import MtpStack
from tests.tiny import random_backbone, random_stack

ELSEWHERE = torch.device("meta")
SAMPLED = Policy(temperature=0.7, top_k=20, top_p=0.9)
PENALISED = Policy(temperature=0.7, min_p=0.1, penalties=Penalties(1.2, 0.1, 0.1))


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    with (
        torch._functorch.config.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        yield


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    model = random_backbone()
    use_linear_attention(model)
    return nn.Module.to(model, device=ELSEWHERE, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def spread_model() -> DeepseekV4ForCausalLM:
    """The same with its last two layers on another device."""
    model = nn.Module.to(random_backbone(), dtype=torch.bfloat16)
    for name, part in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        nn.Module.to(part[:2] if name == "layers" else part, device=ELSEWHERE)
    return model


@pytest.fixture(scope="module")
def stack(model: DeepseekV4ForCausalLM) -> MtpStack:
    return random_stack(model, 2).to(device=ELSEWHERE, dtype=torch.bfloat16)


def test_a_tensor_on_the_wrong_device_is_noticed(model: DeepseekV4ForCausalLM) -> None:
    with pytest.raises(RuntimeError, match="device"):
        model.lm_head(torch.zeros(1, 64, dtype=torch.bfloat16))


def test_a_step_runs_on_the_backbones_device(model: DeepseekV4ForCausalLM) -> None:
    cache = allocate_cache(model, 2, 64, 4)
    cache.advance(21)
    tokens_BL = torch.zeros(2, 4, dtype=torch.int64, device=ELSEWHERE)
    assert {output.device for output in run_step(model, cache, tokens_BL)} == {ELSEWHERE}


def test_a_step_follows_layers_that_are_spread_over_two_devices(spread_model: DeepseekV4ForCausalLM) -> None:
    model = spread_model
    cache = allocate_cache(model, 2, 64, 4)
    assert [layer.device.type for layer in cache.layers] == ["meta", "meta", "cpu", "cpu"]
    cache.advance(21)
    tokens_BL = torch.zeros(2, 4, dtype=torch.int64, device=ELSEWHERE)
    assert {output.device for output in run_step(model, cache, tokens_BL)} == {ELSEWHERE}


def test_whole_sequences_run_on_the_backbones_device(model: DeepseekV4ForCausalLM) -> None:
    tokens_BS = torch.zeros(2, 40, dtype=torch.int64, device=ELSEWHERE)
    assert {output.device for output in run_backbone(model, tokens_BS)} == {ELSEWHERE}


@pytest.mark.parametrize("policy", [GREEDY, SAMPLED, Policy(min_confidence=0.3), PENALISED])
def test_drafts_are_made_and_verified_on_the_backbones_device(
    model: DeepseekV4ForCausalLM, stack: MtpStack, policy: Policy
) -> None:
    texts = Texts([[1, 2, 3], [4, 5, 6, 7]], Limits(9), 3, ELSEWHERE)
    proposer = MtpProposer(model, stack)
    proposer.start(texts, 3, policy)
    draws = Draws([1, 2], texts.lengths, 9, 3, ELSEWHERE)
    active_B = torch.ones(2, dtype=torch.bool, device=ELSEWHERE)
    u_BK = None if policy.is_greedy else draws.draft(texts.emitted_B)
    draft = proposer.propose(texts.length_B, active_B, u_BK)
    proposer.keep(texts.length_B, torch.zeros(2, 4, 2, 64, dtype=torch.bfloat16, device=ELSEWHERE))
    logits_BLV = torch.zeros(2, 4, 97, dtype=torch.bfloat16, device=ELSEWHERE)
    emission = verify(policy, draft, texts.adjust(policy, draft, logits_BLV), draws.verify(texts.emitted_B, 3))
    assert emission.tokens_BL.device == ELSEWHERE
