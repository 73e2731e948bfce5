"""Greedy speculative decoding emits what plain decoding emits, whatever is drafted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtptrain.decoding.plain import decode_plain
from mtptrain.decoding.records import Limits
from mtptrain.decoding.speculative import accepted_prefix, decode_speculative, settle_passes
from tests.tiny import random_backbone

MODEL = random_backbone()
NEW_TOKENS = 40
TIE_GAP = 1e-4  # fp32 logits of a batched verify differ from single steps by rounding


def prompt_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(seed))


class ScriptedDrafter:
    """Drafts the text's own tokens, except that draft number n goes wrong after `script[n]` of them."""

    def __init__(self, text: list[int], script: list[int]) -> None:
        self.text, self.script, self.calls = text, script, 0

    def draft(self, tokens: list[int], streams_1AND: Tensor, length: int) -> list[int]:
        right = self.script[self.calls % len(self.script)]
        self.calls += 1
        truth = self.text[len(tokens) : len(tokens) + length]
        truth = truth + [0] * (length - len(truth))
        return [token if place < right else (token + 1) % 97 for place, token in enumerate(truth)]


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 20),
    draft_length=st.integers(1, 6),
    script=st.lists(st.integers(0, 6), min_size=1, max_size=8),
)
def test_any_draft_leaves_the_output_unchanged(length: int, draft_length: int, script: list[int]) -> None:
    """Every pattern of rejections rewinds the cache across window and compression boundaries."""
    prompt = prompt_of(length, seed=length)
    plain = decode_plain(MODEL, prompt, Limits(NEW_TOKENS))[0]
    # One token more than is emitted, so that the script also knows the last bonus token.
    text = prompt[0].tolist() + decode_plain(MODEL, prompt, Limits(NEW_TOKENS + 8))[0].tokens
    loop = decode_speculative(MODEL, ScriptedDrafter(text, script), prompt, draft_length, Limits(NEW_TOKENS))
    parted = next((i for i, (a, b) in enumerate(zip(plain.tokens, loop.tokens, strict=True)) if a != b), None)
    assert parted is None or plain.gaps[parted] < TIE_GAP
    if parted is None:
        room, expected, calls = NEW_TOKENS - 1, [], 0
        while room > 0:
            accepted = min(script[calls % len(script)], draft_length, room)
            expected.append(accepted)
            room -= min(accepted + 1, room)
            calls += 1
        assert [record.accepted for record in loop.passes] == expected


def test_a_perfect_draft_reaches_the_ceiling() -> None:
    prompt = prompt_of(9)
    text = prompt[0].tolist() + decode_plain(MODEL, prompt, Limits(60))[0].tokens
    loop = decode_speculative(MODEL, ScriptedDrafter(text, [99]), prompt, 4, Limits(51))
    assert [record.emitted for record in loop.passes] == [5] * 10


@pytest.mark.parametrize("place", [0, 1, 7, 20])
def test_the_stop_token_ends_both_ways_of_decoding_alike(place: int) -> None:
    prompt = prompt_of(13, seed=5)
    tokens = decode_plain(MODEL, prompt, Limits(NEW_TOKENS))[0].tokens
    stop = tokens[place]
    plain = decode_plain(MODEL, prompt, Limits(NEW_TOKENS, frozenset([stop])))[0]
    assert plain.tokens == tokens[: tokens.index(stop) + 1]
    script = ScriptedDrafter(
        prompt[0].tolist() + decode_plain(MODEL, prompt, Limits(NEW_TOKENS + 8))[0].tokens, [3, 0, 2]
    )
    loop = decode_speculative(MODEL, script, prompt, 3, Limits(NEW_TOKENS, frozenset([stop])))
    assert loop.tokens == plain.tokens
    assert sum(record.emitted for record in loop.passes) == len(loop.tokens) - 1


def test_rows_of_a_batch_decode_as_they_do_alone() -> None:
    prompts = torch.cat([prompt_of(10, seed) for seed in range(3)])
    together = decode_plain(MODEL, prompts, Limits(20))
    for row, record in enumerate(together):
        assert record.tokens == decode_plain(MODEL, prompts[row : row + 1], Limits(20))[0].tokens


def test_drafts_past_the_end_are_not_counted() -> None:
    passes = settle_passes([2, 4], draft_length=4, num_tokens=6)
    assert [(p.drafted, p.accepted, p.emitted) for p in passes] == [(4, 2, 3), (2, 2, 2)]


def test_the_accepted_prefix_ends_at_the_first_difference() -> None:
    assert accepted_prefix([5, 6, 7], [5, 6, 8, 9]) == 2
    assert accepted_prefix([5], [5, 1]) == 1
    assert accepted_prefix([4, 5], [5, 5, 5]) == 0
