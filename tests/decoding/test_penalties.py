"""Penalties and min-p: values by hand, and those of transformers."""

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from mtptrain.config import DecodingConfig
from mtptrain.decoding.penalties import Context, Penalties, count_context, exclude_below, penalise
from mtptrain.decoding.policy import NO_PENALTIES, Policy, decoding_policy

V = 13
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(V, (3, 9), generator=GENERATOR)
LOGITS = torch.randn(3, V, generator=GENERATOR) * 3


def test_the_context_counts_prompt_and_output_up_to_the_length() -> None:
    tokens = torch.tensor([[2, 0, 2, 2, 1], [1, 1, 0, 2, 2]])
    context = count_context(tokens, torch.tensor([1, 3]), torch.tensor([4, 3]), 3)
    assert context.text_RV.tolist() == [[1, 0, 3], [1, 2, 0]]
    assert context.output_RV.tolist() == [[1, 0, 2], [0, 0, 0]]
    later = context.after(torch.tensor([0, 2]))
    assert later.text_RV.tolist() == [[2, 0, 3], [1, 2, 1]]
    assert later.output_RV.tolist() == [[2, 0, 2], [0, 0, 1]]
    assert context.output_RV.tolist() == [[1, 0, 2], [0, 0, 0]]


def test_penalties_by_hand() -> None:
    context = Context(torch.tensor([[1.0, 3, 0, 1]]), torch.tensor([[0.0, 2, 0, 1]]))
    logits = torch.tensor([[2.0, 2, 2, -2]])
    assert penalise(logits, Penalties(2.0, 0.25, 0.5), context).tolist() == [[1.0, 1 - 0.5 - 0.5, 2.0, -4 - 0.25 - 0.5]]


@pytest.mark.parametrize("repetition", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(repetition: float) -> None:
    context = count_context(TOKENS, torch.tensor([4, 9, 1]), torch.full((3,), 9), V)
    expected = RepetitionPenaltyLogitsProcessor(repetition)(TOKENS, LOGITS.clone())
    torch.testing.assert_close(penalise(LOGITS, Penalties(repetition), context), expected)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_is_that_of_transformers_at_the_temperature(min_p: float, temperature: float) -> None:
    expected = MinPLogitsWarper(min_p)(TOKENS, LOGITS / temperature).softmax(-1)
    policy = Policy(temperature=temperature, min_p=min_p)
    torch.testing.assert_close(policy.target(LOGITS), expected)
    assert ((policy.target(LOGITS) == 0) == (expected == 0)).all()


def test_an_excluded_token_has_probability_0_and_a_finite_logit() -> None:
    adjusted = exclude_below(LOGITS.double(), 0.5, 3.0)
    assert adjusted.isfinite().all()
    p = (adjusted / 3.0).softmax(-1)
    assert ((p == 0) == (p < p.amax(-1, keepdim=True) / 2)).all()


def test_greedy_decoding_takes_the_likeliest_after_the_penalties() -> None:
    context = Context(torch.ones(1, 3), torch.tensor([[0.0, 4, 0]]))
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    assert Policy().target(logits).tolist() == [[0, 1, 0]]
    policy = Policy(penalties=Penalties(frequency=0.5))
    assert policy.target(logits, context).tolist() == policy.proposal(logits, context).tolist() == [[1, 0, 0]]


def test_the_settings_make_the_policy() -> None:
    assert decoding_policy(DecodingConfig()).penalties == NO_PENALTIES
    config = DecodingConfig(
        temperature=1.0, min_p=0.1, repetition_penalty=1.1, frequency_penalty=-0.5, presence_penalty=2.0
    )
    policy = decoding_policy(config)
    assert (policy.min_p, policy.penalties) == (0.1, Penalties(1.1, -0.5, 2.0))
