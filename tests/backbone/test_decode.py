import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache, CompressorState, SlidingRing
from mtptrain.backbone.decode import break_zero_ties, decode_step
from mtptrain.backbone.decode import prefill as prefill_parts
from tests.tiny import random_backbone

LENGTH = 76  # tokens of the reference: nine windows of 8, nineteen of 4, and the ring of 13 wraps five times
MAX_LENGTH = 90
MAX_STEP = 5
# Below, at and above the boundaries of the sliding window (8), the rates (4, 8) and the ring (8 + 5 slots).
BOUNDARY_LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 21, 25, 26, 27, 31, 32, 33, 63, 64, 65, 76]


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


def random_tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def transformers_forward(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    streams: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: streams.append(output))
    with torch.no_grad():
        hidden_BSD = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    hook.remove()
    return streams[0], hidden_BSD


def empty_cache(model: DeepseekV4ForCausalLM, batch: int, max_length: int = MAX_LENGTH) -> BackboneCache:
    return BackboneCache.allocate(model.config, batch, max_length, MAX_STEP)


def prefill(
    model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Streams and hidden of prompts of one length."""
    batch, length = tokens_BS.shape
    parts = list(prefill_parts(model, cache, tokens_BS, [length] * batch, chunk))
    return torch.cat([part.streams_BSND for part in parts], 1), torch.cat([part.hidden_BSD for part in parts], 1)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    # Four layers of fp32 sums in another order: some tens of ulps of the largest value (at most 25 were seen).
    largest = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = 64 * torch.finfo(torch.float32).eps * max(1.0, largest)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def decode_in_steps(
    model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    parts = [decode_step(model, cache, tokens_Bs) for tokens_Bs in tokens_BS.split(sizes, dim=1)]
    streams, hidden = zip(*parts, strict=True)
    return torch.cat(streams, dim=1), torch.cat(hidden, dim=1)


def step_sizes(total: int, pattern: list[int]) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(pattern[len(sizes) % len(pattern)], total - sum(sizes)))
    return sizes


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


def test_the_indexer_of_transformers_is_equalled_without_a_tie_rule_where_no_ties_occur() -> None:
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


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decoding_goes_on_as_if_a_rewound_draft_had_never_been(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """Prefix, then rounds of drafting garbage and keeping only its true beginning, then the true tokens."""
    tokens_1S, length = tokens_BS[:1], data.draw(st.integers(1, LENGTH - 3 * MAX_STEP - 1), label="prefix")
    cache = empty_cache(model, 1)
    prefill(model, cache, tokens_1S[:, :length], chunk=31)
    for number in range(data.draw(st.integers(1, 3), label="rounds")):
        drafted = data.draw(st.integers(1, MAX_STEP), label="drafted")
        highest = max(int(cache.written_B), length + drafted)
        kept = data.draw(st.integers(max(0, highest - MAX_STEP - length), drafted), label="kept")
        garbage_1S = random_tokens(1, drafted, seed=number + 100)
        draft_1S = torch.cat([tokens_1S[:, length : length + kept], garbage_1S[:, kept:]], dim=1)
        streams_1SND, _ = decode_step(model, cache, draft_1S)
        assert_equal_to_rounding(streams_1SND[:, :kept], reference[0][:1, length : length + kept])
        length += kept
        cache.rewind(torch.tensor([length]))
    rest_1S = tokens_1S[:, length:]
    sizes = step_sizes(rest_1S.shape[1], data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="sizes"))
    streams_1SND, hidden_1SD = decode_in_steps(model, cache, rest_1S, sizes)
    assert_equal_to_rounding(streams_1SND, reference[0][:1, length:])
    assert_equal_to_rounding(hidden_1SD, reference[1][:1, length:])


def defined_state(cache: BackboneCache, length: int) -> list[Tensor]:
    """Every part of a cache of batch 1 that decoding from `length` on may read, in order of position."""

    def newest(ring: SlidingRing, start: int) -> Tensor:
        return ring.values_BRC[0, torch.arange(max(start, 0), length) % ring.size]

    def compressor(state: CompressorState) -> list[Tensor]:
        open_window = length // state.rate
        raw = newest(state.raw, (open_window - state.span + 1) * state.rate)
        return [raw, state.entries_BWC[0, :open_window]]

    parts: list[Tensor] = []
    for layer in cache.layers:
        parts.append(newest(layer.ring, length - cache.window + 1))
        parts += [part for state in (layer.compressor, layer.indexer) if state for part in compressor(state)]
    return parts


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 12, 15, 16, 31, 32, 37])
@pytest.mark.parametrize("rejected", [1, 3, 5])
def test_rewound_cache_equals_fresh_prefill(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, length: int, rejected: int
) -> None:
    fresh, rewound = empty_cache(model, 1), empty_cache(model, 1)
    prefill(model, fresh, tokens_BS[:1, :length])
    prefill(model, rewound, tokens_BS[:1, :length])
    decode_step(model, rewound, random_tokens(1, rejected, seed=length))
    rewound.rewind(torch.tensor([length]))
    for got, expected in zip(defined_state(rewound, length), defined_state(fresh, length), strict=True):
        assert_equal_to_rounding(got, expected)
    assert torch.equal(rewound.length_B, fresh.length_B)


@pytest.mark.parametrize("length", [1, 6, 8, 11, 16, 30])
def test_state_outside_the_defined_part_is_never_read(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, length: int
) -> None:
    clean, poisoned = empty_cache(model, 1), empty_cache(model, 1)
    for cache in (clean, poisoned):
        prefill(model, cache, tokens_BS[:1, :length])
    saved = [part.clone() for part in defined_state(poisoned, length)]
    poison_undefined(poisoned, length)
    assert all(map(torch.equal, defined_state(poisoned, length), saved))
    for tokens_1S in tokens_BS[:1, length : length + 20].split(4, dim=1):
        for got, expected in zip(
            decode_step(model, poisoned, tokens_1S), decode_step(model, clean, tokens_1S), strict=True
        ):
            assert torch.equal(got, expected)


def poison_undefined(cache: BackboneCache, length: int) -> None:
    """Overwrite what `defined_state` leaves out with large values (finite: a masked NaN would still spread)."""

    def poison_ring(ring: SlidingRing, start: int) -> None:
        stale = torch.ones(ring.size, dtype=torch.bool)
        stale[torch.arange(max(start, 0), length) % ring.size] = False
        ring.values_BRC[0, stale] = 1e4

    for layer in cache.layers:
        poison_ring(layer.ring, length - cache.window + 1)
        for state in (layer.compressor, layer.indexer):
            if state is not None:
                open_window = length // state.rate
                poison_ring(state.raw, (open_window - state.span + 1) * state.rate)
                state.entries_BWC[0, open_window:] = 1e4


def test_rows_rewound_independently_equal_single_rows(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor]
) -> None:
    cache, lengths = empty_cache(model, 3), [5, 16, 23]
    for row, length in enumerate(lengths):
        prefill(model, cache.rows(slice(row, row + 1)), tokens_BS[row : row + 1, :length])
    for number in range(12):
        kept = [(number + 2 * row) % 4 + 1 for row in range(3)]
        draft_BS = random_tokens(3, MAX_STEP, seed=number)
        for row, (length, keep) in enumerate(zip(lengths, kept, strict=True)):
            draft_BS[row, :keep] = tokens_BS[row, length : length + keep]
        streams_BSND, _ = decode_step(model, cache, draft_BS)
        for row, (length, keep) in enumerate(zip(lengths, kept, strict=True)):
            assert_equal_to_rounding(streams_BSND[row, :keep], reference[0][row, length : length + keep])
        lengths = [length + keep for length, keep in zip(lengths, kept, strict=True)]
        cache.rewind(torch.tensor(lengths))


def test_a_reset_cache_decodes_like_a_new_one(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> None:
    used = empty_cache(model, 1)
    prefill(model, used, tokens_BS[:1])
    used.reset()
    got, expected = (prefill(model, cache, tokens_BS[1:2, :30], chunk=7) for cache in (used, empty_cache(model, 1)))
    assert all(map(torch.equal, got, expected))


def test_decoding_works_under_inference_mode(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor]
) -> None:
    with torch.inference_mode():
        streams_BSND, _ = prefill(model, empty_cache(model, 3), tokens_BS, chunk=20)
    assert_equal_to_rounding(streams_BSND, reference[0])


def test_a_rewind_out_of_range_is_refused_and_changes_nothing(model: DeepseekV4ForCausalLM, tokens_BS: Tensor) -> None:
    cache = empty_cache(model, 3)
    prefill(model, cache, tokens_BS[:, :20])
    for lengths, message in (
        ([20, 14, 20], "max_step=5"),
        ([20, 21, 20], "must lie between 0 and"),
        ([20, -1, 20], "must lie between 0 and"),
        ([20, 20], "one length a row"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.rewind(torch.tensor(lengths))
        assert cache.length_B.tolist() == [20, 20, 20]
    cache.rewind(torch.tensor([15, 20, 17]))
    assert cache.length_B.tolist() == [15, 20, 17]


def test_two_rewinds_together_may_not_take_back_more_than_one_step(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor
) -> None:
    cache = empty_cache(model, 1)
    prefill(model, cache, tokens_BS[:1, :20])
    cache.rewind(torch.tensor([16]))
    decode_step(model, cache, tokens_BS[:1, 16:17])
    with pytest.raises(ValueError, match=r"max_step=5 tokens can be taken back from \[20\]"):
        cache.rewind(torch.tensor([14]))


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
def test_ring_positions_name_what_the_slots_hold(length: int) -> None:
    ring = SlidingRing.allocate(batch=1, size=4, channels=1, dtype=torch.float32)
    ring.values_BRC.fill_(-1.0)
    if length:
        positions_1S = torch.arange(length).unsqueeze(0)
        ring.write(ring.slots(positions_1S), positions_1S.unsqueeze(-1).float())
    held_R = ring.positions(torch.tensor([length]))[0].clamp(min=-1)
    assert torch.equal(held_R.float(), ring.values_BRC[0, :, 0])


def test_transformers_forward_of_a_prefix_does_not_depend_on_what_follows(
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
