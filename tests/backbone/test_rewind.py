"""A rewound cache behaves as if the rejected tokens had never been decoded, for each row independently."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache, SlidingRing
from mtptrain.backbone.decode import decode_step
from tests.backbone.cached import (
    LENGTH,
    MAX_STEP,
    assert_equal_to_rounding,
    decode_in_steps,
    defined_state,
    empty_cache,
    prefill,
    random_tokens,
    step_sizes,
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decoding_goes_on_as_if_a_rewound_draft_had_never_been(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, reference: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """Prefix, then rounds that draft random tokens and keep only the correct start, then the true tokens."""
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
    end = length + 24
    rest_1S = tokens_1S[:, length:end]
    sizes = step_sizes(rest_1S.shape[1], data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="sizes"))
    streams_1SND, hidden_1SD = decode_in_steps(model, cache, rest_1S, sizes)
    assert_equal_to_rounding(streams_1SND, reference[0][:1, length:end])
    assert_equal_to_rounding(hidden_1SD, reference[1][:1, length:end])


def prefill_rows(model: DeepseekV4ForCausalLM, tokens_BS: Tensor, lengths: list[int]) -> BackboneCache:
    """Return a cache whose rows hold the first tokens of each text, with every row run alone."""
    cache = empty_cache(model, len(lengths))
    for row, length in enumerate(lengths):
        prefill(model, cache.rows(slice(row, row + 1)), tokens_BS[row : row + 1, :length])
    return cache


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_rewound_independently_equal_fresh_prefills(
    model: DeepseekV4ForCausalLM, tokens_BS: Tensor, data: st.DataObject
) -> None:
    """Rows of unequal length draft together and keep unequal numbers; every tensor then equals a fresh prefill's."""
    rows = range(data.draw(st.integers(1, 3), label="rows"))
    lengths = [data.draw(st.integers(1, 40), label=f"length {row}") for row in rows]
    cache = prefill_rows(model, tokens_BS, lengths)
    for number in range(data.draw(st.integers(1, 3), label="rounds")):
        drafted = data.draw(st.integers(1, MAX_STEP), label="drafted")
        highest = [
            max(written, length + drafted) for written, length in zip(cache.written_B.tolist(), lengths, strict=True)
        ]
        kept = [data.draw(st.integers(max(0, highest[row] - MAX_STEP - lengths[row]), drafted)) for row in rows]
        draft_BS = random_tokens(len(rows), drafted, seed=number)
        for row in rows:
            draft_BS[row, : kept[row]] = tokens_BS[row, lengths[row] : lengths[row] + kept[row]]
        decode_step(model, cache, draft_BS)
        lengths = [length + keep for length, keep in zip(lengths, kept, strict=True)]
        cache.rewind(torch.tensor(lengths))
    fresh = prefill_rows(model, tokens_BS, lengths)
    assert torch.equal(cache.length_B, fresh.length_B)
    for row, length in enumerate(lengths):
        states = [defined_state(one.rows(slice(row, row + 1)), length) for one in (cache, fresh)]
        for got, expected in zip(*states, strict=True):
            assert_equal_to_rounding(got, expected)


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
    """Overwrite everything outside `defined_state` with large values (finite: a masked NaN would still spread)."""

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
