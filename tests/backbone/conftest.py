"""The backbone of the cache tests, and transformers' forward of their tokens as the reference."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from tests.backbone.cached import LENGTH, random_tokens, transformers_forward
from tests.tiny import random_backbone


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    torch.set_num_threads(1)
    return random_backbone(seed=0)


@pytest.fixture(scope="module")
def tokens_BS() -> Tensor:
    return random_tokens(3, LENGTH, seed=1)


@pytest.fixture(scope="module")
def reference(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return streams and hidden states of transformers' forward over LENGTH tokens; causal, so valid for prefixes."""
    return transformers_forward(model, tokens_BS)
