"""Decoding through the cache equals transformers' forward for any step sizes."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache, SlidingRing
from mtptrain.backbone.decode import break_zero_ties, decode_step
from tests.backbone.cached import (
    LENGTH,
    assert_equal_to_rounding,
    decode_in_steps,
    empty_cache,
    prefill,
    random_tokens,
    step_sizes,
    transformers_forward,
)
from tests.tiny import random_backbone

# Below, at and above the boundaries of the sliding window (8), the rates (4, 8) and the ring (8 + 5 slots).
BOUNDARY_LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 21, 25, 26, 27, 31, 32, 33, 63, 64, 65, 76]


@pytest.mark.parametrize("length", BOUNDARY_LENGTHS)
def test_prefill_equals_the_full_forward_of_transformers(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, length: int
) -> None:
    streams_BSND, hidden_BSD = transformers_forward(model, tokens_BS[:, :length])
    cache = empty_cache(model, 3)
    actual_BSND, actual_BSD = prefill(model, cache, tokens_BS[:, :length])
    assert_equal_to_rounding(actual_BSND, streams_BSND)
    assert_equal_to_rounding(actual_BSD, hidden_BSD)
    assert cache.length_B.tolist() == [length] * 3


@pytest.mark.parametrize(
    "pattern", [[1], [2], [3], [4], [5], [1, 2, 3, 4, 5], [5, 1, 4, 2], [29], [9, 14, 1]], ids=lambda p: str(p)
)
def test_any_mixture_of_step_sizes_equals_the_full_forward(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor], pattern: list[int]
) -> None:
    actual = decode_in_steps(model, empty_cache(model, 3), tokens_BS, step_sizes(LENGTH, pattern))
    for got, expected in zip(actual, reference, strict=True):
        assert_equal_to_rounding(got, expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"index_topk": 1},
        {"index_topk": 64},
        {"hc_mult": 4, "n_routed_experts": 3, "num_attention_heads": 4},
        {"compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5}, "sliding_window": 7},
        {"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2},
        {"layer_types": ["sliding_attention"] * 4},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32,
                "beta_slow": 1,
            }
        },
    ],
    ids=["top-1", "keeps all entries", "wider", "odd rates", "no sliding layer", "sliding only", "yarn"],
)
def test_other_shapes_of_the_model_decode_to_the_full_forward(overrides: dict) -> None:
    model, tokens_BS = random_backbone(seed=2, **overrides), random_tokens(2, 41, seed=3)
    streams_BSND, _ = transformers_forward(model, tokens_BS)
    actual_BSND, _ = decode_in_steps(model, empty_cache(model, 2), tokens_BS, step_sizes(41, [6, 1, 3]))
    assert_equal_to_rounding(actual_BSND, streams_BSND)


def test_the_indexer_equals_that_of_transformers_without_a_tie_rule_if_no_ties_occur() -> None:
    model, tokens_BS = random_backbone(seed=4, index_n_heads=24), random_tokens(2, LENGTH, seed=5)
    model.model.layers[1].self_attn.compressor.indexer.scorer._forward_hooks.clear()
    streams_BSND, _ = transformers_forward(model, tokens_BS)
    actual_BSND, _ = decode_in_steps(model, empty_cache(model, 2), tokens_BS, step_sizes(LENGTH, [5, 2]))
    assert_equal_to_rounding(actual_BSND, streams_BSND)


@pytest.mark.parametrize("max_length", [3, 7, 15])
def test_a_cache_too_short_for_the_indexer_equals_the_full_forward(
    model: DeepseekV4ForCausalLM, reference: tuple[Tensor, Tensor], tokens_BS: Tensor, max_length: int
) -> None:
    cache = empty_cache(model, 3, max_length)
    assert cache.layers[1].indexer is None
    actual_BSND, _ = decode_in_steps(model, cache, tokens_BS[:, :max_length], step_sizes(max_length, [2, 1]))
    assert_equal_to_rounding(actual_BSND, reference[0][:, :max_length])


def test_decoding_works_under_inference_mode(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor]
) -> None:
    with torch.inference_mode():
        streams_BSND, _ = prefill(model, empty_cache(model, 3), tokens_BS, chunk=20)
    assert_equal_to_rounding(streams_BSND, reference[0])


def test_tokens_beyond_the_cache_and_wrong_batches_are_refused(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> None:
    cache = empty_cache(model, 3, max_length=10)
    prefill(model, cache, tokens_BS[:, :8])
    with pytest.raises(ValueError, match="max_length=10 leaves no room for 3 more tokens after 8"):
        decode_step(model, cache, tokens_BS[:, 8:11])
    with pytest.raises(ValueError, match=r"tokens must be \[3, S >= 1\]"):
        decode_step(model, cache, tokens_BS[:2, 8:9])
    with pytest.raises(ValueError, match="max_step must be at least 1"):
        BackboneCache.allocate(model.config, 1, 10, 0)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 11, 12])
def test_ring_positions_equal_the_content_of_the_slots(length: int) -> None:
    ring = SlidingRing.allocate(batch=1, size=4, channels=1, dtype=torch.float32)
    ring.values_BRC.fill_(-1.0)
    if length:
        positions_1S = torch.arange(length).unsqueeze(0)
        ring.write(ring.slots(positions_1S), positions_1S.unsqueeze(-1).float())
    held_R = ring.positions(torch.tensor([length]))[0].clamp(min=-1)
    assert torch.equal(held_R.float(), ring.values_BRC[0, :, 0])


def test_transformers_forward_of_a_prefix_does_not_depend_on_later_tokens(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor]
) -> None:
    """Fails without `make_indexers_causal`, which `random_backbone` calls."""
    for length in (29, 41, 53, 65):
        streams_BSND, _ = transformers_forward(model, tokens_BS[:, :length])
        assert_equal_to_rounding(streams_BSND, reference[0][:, :length])


def test_the_choice_among_entries_scored_zero_does_not_depend_on_later_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BSW = torch.randn(5, 40, 13, generator=generator)
    scores_BSW[torch.rand(scores_BSW.shape, generator=generator) < 0.5] = 0.0
    ordered_BSW = break_zero_ties(scores_BSW)
    assert torch.equal(break_zero_ties(ordered_BSW), ordered_BSW)
    assert torch.equal(ordered_BSW[scores_BSW != 0], scores_BSW[scores_BSW != 0])
    chosen_BSk = ordered_BSW.topk(4).indices
    for more in (1, 30, 400):
        future_BSW = torch.full((5, 40, more), float("-inf"))
        assert torch.equal(torch.cat([ordered_BSW, future_BSW], dim=-1).topk(4).indices, chosen_BSk)


def test_of_entries_scored_zero_the_earlier_ones_win_and_no_other_order_changes() -> None:
    scores_BSW = torch.tensor([[[0.0, 0.5, 0.0, -1e-3, 0.0]]])
    order_W = break_zero_ties(scores_BSW)[0, 0].argsort(descending=True)
    assert order_W.tolist() == [1, 0, 2, 4, 3]
