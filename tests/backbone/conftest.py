"""The backbone that the tests of its cache run, and what transformers' own forward gives for their tokens."""

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
    """Streams and hidden of transformers' forward over LENGTH tokens; the model is causal, so a prefix's too."""
    return transformers_forward(model, tokens_BS)
