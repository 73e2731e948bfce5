"""Speculative decoding emits the texts of plain decoding for any draft, and each row is independent."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtptrain.backbone.decode import PrefilledPart
from mtptrain.config import DraftChoice
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.penalties import Penalties
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded, Limits, settle_passes
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.errors import UserError
from mtptrain.kernels.acceptance import Verification
from tests.replay.plain_loop import decode_plainly
from tests.tiny import random_stack, three_layers

# B rows, K drafted tokens

MODEL = three_layers()
NEW_TOKENS = 24  # three sliding windows, six and three compression windows
LIMITS = Limits(NEW_TOKENS)
TIE_GAP = 1e-4  # fp32 logits of a batched verify differ from single steps by rounding


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def plain_rows(prompts: tuple[tuple[int, ...], ...], new_tokens: int) -> list[Decoded]:
    return decode_plain(MODEL, [list(prompt) for prompt in prompts], Limits(new_tokens)).rows


def plain(prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Decoded]:
    """Return the texts of plain decoding, which are decoded once; do not change them."""
    return plain_rows(tuple(map(tuple, prompts)), new_tokens)


class ScriptedProposer:
    """Drafts each text's own tokens, except that draft n goes wrong after `script[n]` of them."""

    def __init__(self, texts: list[list[int]], scripts: list[list[int]]) -> None:
        self.truth, self.scripts, self.calls = texts, scripts, 0

    def start(self, texts: Texts, draft_length: int, policy: Policy) -> None:
        self.texts, self.draft_length = texts, draft_length

    def read(self, part: PrefilledPart) -> None:
        pass

    def keep(self, first_B: Tensor, streams_BSND: Tensor) -> None:
        pass

    def draft(self, u_BK: Tensor | None) -> Draft:
        rows = [self._row(row, known) for row, known in enumerate(self.texts.length_B.tolist())]
        self.calls += 1
        return Draft(torch.tensor(rows), None, torch.full((len(rows),), self.draft_length))

    def _row(self, row: int, known: int) -> list[int]:
        script = self.scripts[row]
        right = script[self.calls % len(script)]
        truth = (self.truth[row] + [0] * self.draft_length)[known : known + self.draft_length]
        truth += [0] * (self.draft_length - len(truth))
        return [token if index < right else (token + 1) % 97 for index, token in enumerate(truth)]


def accepted_by_script(script: list[int], draft_length: int) -> list[int]:
    room, expected, calls = NEW_TOKENS - 1, [], 0
    while room > 0:
        expected.append(min(script[calls % len(script)], draft_length, room))
        room -= min(expected[-1] + 1, room)
        calls += 1
    return expected


LONGEST = 20
PROMPTS = [prompt_of(length, seed=10 * row + length) for row in range(3) for length in range(1, LONGEST + 1)]
SCRIPTS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=3, max_size=3)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=3, max_size=3), draft_length=st.integers(1, 6), scripts=SCRIPTS
)
def test_any_draft_leaves_the_output_unchanged(lengths: list[int], draft_length: int, scripts: list[list[int]]) -> None:
    """Every pattern of rejections rewinds each row across window and compression boundaries."""
    chosen = [LONGEST * row + length - 1 for row, length in enumerate(lengths)]
    prompts = [PROMPTS[number] for number in chosen]
    # Longer than the emitted texts, so that the script also knows the last token of the verifier.
    expected = [plain(PROMPTS, NEW_TOKENS + 8)[number] for number in chosen]
    texts = [prompt + row.tokens for prompt, row in zip(prompts, expected, strict=True)]
    loop = decode_speculative(MODEL, ScriptedProposer(texts, scripts), prompts, draft_length, LIMITS).rows
    for row, script in enumerate(scripts):
        pairs = zip(expected[row].tokens[:NEW_TOKENS], loop[row].tokens, strict=True)
        mismatch = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
        assert mismatch is None or expected[row].gaps[mismatch] < TIE_GAP
        if mismatch is None:
            assert [verify_pass.accepted for verify_pass in loop[row].passes] == accepted_by_script(
                script, draft_length
            )


def test_the_drafted_token_that_a_pass_rejects_is_recorded() -> None:
    """A script's wrong token is the right one's successor; a pass that keeps its whole draft rejects nothing."""
    prompt = prompt_of(7)
    text = prompt + plain([prompt], NEW_TOKENS + 8)[0].tokens
    row = decode_speculative(MODEL, ScriptedProposer([text], [[0, 3, 1]]), [prompt], 3, Limits(20)).rows[0]
    emitted, expected = 1, []
    for verify_pass in row.passes:
        slot = len(prompt) + emitted + verify_pass.accepted
        expected.append(None if verify_pass.accepted == 3 else (text[slot] + 1) % 97)
        emitted += verify_pass.emitted
    assert row.rejected[:-1] == expected[:-1]  # the last draft is cut by the end of the text
    assert len(row.rejected) == len(row.passes)


POLICIES = {
    "greedy": Policy(),
    "greedy_stopped": Policy(min_confidence=0.11),
    "sampled": Policy(temperature=1.0),
    "cut_block": Policy(temperature=0.7, top_k=20, top_p=0.9, verification=Verification.block),
    "greedy_drafts_stopped": Policy(temperature=1.3, draft=DraftChoice.greedy, min_confidence=0.09),
    "block_stopped": Policy(temperature=1.0, min_confidence=0.1, verification=Verification.block),
    "greedy_penalised": Policy(penalties=Penalties(1.3, 0.5, 0.2)),
    "penalised_min_p": Policy(temperature=1.0, min_p=0.1, top_p=0.9, penalties=Penalties(0.7, -0.2, 1.0)),
}


# Each policy at one depth; confidence, penalties, top-p, draws, greedy drafts and block verification each at both: the
# whole product takes twice the time.
@pytest.mark.parametrize(("name", "depth"), zip(POLICIES, [1, 2, 2, 1, 1, 2, 1, 2], strict=True))
def test_decoding_equals_a_loop_without_cache_or_batch(name: str, depth: int) -> None:
    policy, stack = POLICIES[name], random_stack(MODEL, depth)
    prompts, seeds, length = [prompt_of(11, 1), prompt_of(3, 2)], [7, 2**40 + 3], 3
    run = decode_speculative(MODEL, MtpProposer(MODEL, stack), prompts, length, Limits(14), policy, seeds)
    for prompt, seed, row in zip(prompts, seeds, run.rows, strict=True):
        trace, passes = decode_plainly(MODEL, stack, prompt, length, policy, new=14, seed=seed)
        assert row.tokens == trace.tokens
        assert row.passes == passes
        torch.testing.assert_close(torch.tensor(row.probabilities), torch.tensor(trace.probabilities))
    if policy.min_confidence:
        drafted = {record.drafted for row in run.rows for record in row.passes[:-3]}
        assert drafted == {0, 1, 2, 3}, "the threshold must stop drafts at every step, and some not"


# Each policy at one depth and each depth with several policies: the whole product takes twice the time.
@pytest.mark.parametrize(("name", "depth"), zip(POLICIES, [1, 3, 3, 1, 1, 3, 1, 3], strict=True))
def test_a_row_does_not_depend_on_its_batch(name: str, depth: int) -> None:
    policy = POLICIES[name]
    stack = random_stack(MODEL, depth)
    prompts, seeds = [prompt_of(length, length) for length in (5, 1, 13)], [11, 12, 13]
    limits = Limits(17)  # two sliding windows, four and two compression windows, and a token
    together = decode_speculative(MODEL, MtpProposer(MODEL, stack), prompts, 4, limits, policy, seeds).rows
    for row, prompt in enumerate(prompts):
        alone = decode_speculative(MODEL, MtpProposer(MODEL, stack), [prompt], 4, limits, policy, [seeds[row]]).rows[0]
        assert (together[row].tokens, together[row].passes) == (alone.tokens, alone.passes)


@pytest.mark.parametrize("draft_length", [1, 8])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_head_leaves_greedy_output_unchanged_at_any_draft_length(depth: int, draft_length: int) -> None:
    prompts = [prompt_of(length, length) for length in (5, 1, 13)]
    loop = decode_speculative(MODEL, MtpProposer(MODEL, random_stack(MODEL, depth)), prompts, draft_length, LIMITS).rows
    assert [row.tokens for row in loop] == [row.tokens for row in plain(prompts)]


def test_plain_sampling_follows_the_draws_of_its_row_alone() -> None:
    policy, prompts = Policy(temperature=1.0), [prompt_of(4, 1), prompt_of(9, 2)]
    together = decode_plain(MODEL, prompts, LIMITS, policy, [3, 4]).rows
    alone = [
        decode_plain(MODEL, [prompt], LIMITS, policy, [seed]).rows[0]
        for prompt, seed in zip(prompts, (3, 4), strict=True)
    ]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert together[0].tokens != decode_plain(MODEL, prompts, LIMITS, policy, [5, 4]).rows[0].tokens


def test_a_perfect_draft_reaches_the_ceiling() -> None:
    prompt = prompt_of(9)
    text = prompt + plain([prompt], 60)[0].tokens
    loop = decode_speculative(MODEL, ScriptedProposer([text], [[99]]), [prompt], 4, Limits(51)).rows[0]
    assert [verify_pass.emitted for verify_pass in loop.passes] == [5] * 10


@pytest.mark.parametrize("index", [0, 1, 7, 20])
def test_the_stop_token_ends_both_ways_of_decoding_alike(index: int) -> None:
    prompts = [prompt_of(13, seed=5), prompt_of(6, seed=6)]
    tokens = plain(prompts)[0].tokens
    limits = replace(LIMITS, stop=frozenset([tokens[index]]))
    stopped = decode_plain(MODEL, prompts, limits).rows
    assert stopped[0].tokens == tokens[: tokens.index(tokens[index]) + 1]
    texts = [prompt + row.tokens for prompt, row in zip(prompts, plain(prompts, NEW_TOKENS + 8), strict=True)]
    loop = decode_speculative(MODEL, ScriptedProposer(texts, [[3, 0, 2], [1]]), prompts, 3, limits).rows
    assert [row.tokens for row in loop] == [row.tokens for row in stopped]
    assert sum(verify_pass.emitted for verify_pass in loop[0].passes) == len(loop[0].tokens) - 1


def test_seconds_of_the_phases_add_up_to_no_more_than_the_total() -> None:
    run = decode_speculative(MODEL, MtpProposer(MODEL, random_stack(MODEL)), [prompt_of(4)], 2, LIMITS)
    phases = (run.seconds.prefill, run.seconds.draft, run.seconds.verify, run.seconds.sample, run.seconds.rewind)
    assert min(phases) > 0
    assert sum(phases) <= run.seconds.total


def test_drafts_past_the_end_are_not_counted() -> None:
    passes = settle_passes([2, 4], drafted=[4, 4], num_tokens=6)
    assert [(p.drafted, p.accepted, p.emitted) for p in passes] == [(4, 2, 3), (2, 2, 2)]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="prompt 2 is empty"):
        decode_plain(MODEL, [[1], []], LIMITS)
