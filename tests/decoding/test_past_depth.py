"""Draft steps beyond the depth of stacked modules: loop, cacheless loop and replay agree under every policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mtptrain.certificate.loop import certify_sampled_runs, loop_runs
from mtptrain.config import DecodingConfig, DraftChoice, PastDepth
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.decoding.wrapped import head_proposer
from mtptrain.errors import UserError
from mtptrain.evaluation.breakdown import sweep_thresholds
from mtptrain.evaluation.speedup import run_interleaved
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.replay import (
    count_passes,
    listed_passes,
    replay_counts,
    replay_lengths,
    replay_other_drafts,
    replay_passes,
)
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.replay.plain_loop import decode_plainly
from tests.tiny import random_stack, three_layers

MODEL = three_layers()
SMALL = three_layers(vocab_size=7)
PAIR = three_layers(vocab_size=2)
DRAWN = {
    "greedy": Policy(),
    "sampled": Policy(temperature=1.0),
    "greedy drafts": Policy(temperature=1.5, draft=DraftChoice.greedy),
}
PROMPTS = [[5, 1, 4, 3, 2, 6, 0, 2, 1, 1, 3], [3, 6]]


# A Latin square: each two of the three occur together, in a third of the time of the whole product.
@pytest.mark.parametrize(
    ("drawn", "past_depth", "depth"),
    [
        ("greedy", PastDepth.repeat_last, 3),
        ("greedy", PastDepth.wrap_around, 2),
        ("greedy", PastDepth.stop, 1),
        ("sampled", PastDepth.repeat_last, 2),
        ("sampled", PastDepth.wrap_around, 1),
        ("sampled", PastDepth.stop, 3),
        ("greedy drafts", PastDepth.repeat_last, 1),
        ("greedy drafts", PastDepth.wrap_around, 3),
        ("greedy drafts", PastDepth.stop, 2),
    ],
)
def test_loop_cacheless_loop_and_replay_agree(drawn: str, past_depth: PastDepth, depth: int) -> None:
    """With two tokens to choose from, drafts are kept past the depth."""
    policy, stack = replace(DRAWN[drawn], past_depth=past_depth), random_stack(PAIR, depth)
    length, prompt = 4, [token % 2 for token in PROMPTS[0]]
    trace, passes = decode_plainly(PAIR, stack, prompt, length, policy, new=10, seed=2**40 + 3)
    proposer = head_proposer(PAIR, stack, policy, length)
    (row,) = decode_speculative(PAIR, proposer, [prompt], length, Limits(10), policy, [2**40 + 3]).rows
    assert row.tokens == trace.tokens
    assert row.passes == passes
    torch.testing.assert_close(torch.tensor(row.probabilities), torch.tensor(trace.probabilities))
    if not policy.draws_greedily:  # passes of sampled drafts have expectations only: tested below
        return
    _, counts = replay_lengths(PAIR, stack, [trace], length, policy)
    expected, counted = counts[length][0], count_passes(passes, length)
    assert expected.passes == pytest.approx(counted.passes, abs=1e-9)
    for name in ("drafted_K", "reached_K", "accepted_K"):
        np.testing.assert_allclose(getattr(expected, name), getattr(counted, name), atol=1e-9)
    if policy.is_greedy:
        assert replay_passes(draft_traces(PAIR, stack, [trace], length, policy)[0], policy, length) == passes


@pytest.mark.parametrize("past_depth", PastDepth)
def test_replay_of_every_draft_length_equals_the_loop(past_depth: PastDepth) -> None:
    """With two tokens to choose from, many drafts are kept: passes of every length occur."""
    policy, stack = Policy(temperature=2.0, draft=DraftChoice.greedy, past_depth=past_depth), random_stack(PAIR, 2)
    for length in (1, 2, 3, 5):
        proposer = head_proposer(PAIR, stack, policy, length)
        rows = decode_speculative(PAIR, proposer, [[0, 1, 1, 0, 1], [1]], length, Limits(24), policy, [5, 6]).rows
        traces = [
            Trace(Prompt(prompt, "text", 0), row.tokens, row.gaps, row.probabilities)
            for prompt, row in zip([[0, 1, 1, 0, 1], [1]], rows, strict=True)
        ]
        _, counts = replay_lengths(PAIR, stack, traces, 5, policy)
        for row, expected in zip(rows, counts[length], strict=True):
            counted = count_passes(row.passes, length)
            assert expected.passes == pytest.approx(counted.passes, abs=1e-9)
            np.testing.assert_allclose(expected.accepted_K, counted.accepted_K, atol=1e-9)
        kept = {record.accepted for row in rows for record in row.passes}
        assert kept >= {0, 1, policy.drafted_steps(2, length)}


@pytest.mark.parametrize("past_depth", PastDepth)
def test_the_certificate_compares_the_loop_with_replay_under_every_policy(past_depth: PastDepth) -> None:
    stacks, tokens = {"head": random_stack(SMALL, 2)}, PROMPTS[0]
    traces = [Trace(Prompt(tokens, "text", 0), [], [], [])]
    for policy in (Policy(past_depth=past_depth), replace(DRAWN["greedy drafts"], past_depth=past_depth)):
        runs = run_interleaved(SMALL, stacks, [traces], [2, 4], Limits(10), policy, 0, lambda *_: None)
        loops = loop_runs(SMALL, stacks, runs, policy)
        assert [listed_passes(one.at_anchors) for one in loops] == [one.loop.passes for one in loops]
        if not policy.is_greedy:
            result = certify_sampled_runs(SMALL, stacks, runs, policy)
            assert result.passed
            assert {one.standard_error for one in result.tests} == {0}  # greedy drafts leave nothing to chance


@pytest.mark.parametrize("past_depth", [PastDepth.repeat_last, PastDepth.stop])
def test_passes_of_sampled_drafts_follow_their_distribution(past_depth: PastDepth) -> None:
    policy, stack, length = replace(DRAWN["sampled"], past_depth=past_depth), random_stack(SMALL, 2), 3
    differences = []
    for seed in range(12):
        trace, passes = decode_plainly(SMALL, stack, [seed % 7, 3, 5], length, policy, new=6, seed=seed)
        (drafts,) = draft_traces(SMALL, stack, [trace], length, policy)
        expected, counted = replay_counts(drafts, policy)[length], count_passes(passes, length)
        assert expected.drafted_K is not None
        assert counted.drafted_K is not None
        differences.append(np.concatenate([counted.drafted_K, counted.accepted_K]))
        differences[-1] -= np.concatenate([expected.drafted_K, expected.accepted_K])
    error = np.std(differences, axis=0) / np.sqrt(len(differences))
    assert (np.abs(np.mean(differences, axis=0)) <= 4 * error + 1e-9).all()


@pytest.mark.parametrize(("depth", "length"), [(1, 4), (3, 3), (3, 2)])
def test_a_draft_within_the_depth_or_of_one_module_is_the_same_in_any_case(depth: int, length: int) -> None:
    stack = random_stack(MODEL, depth)
    policies = [Policy(past_depth=one) for one in (PastDepth.repeat_last, PastDepth.wrap_around, PastDepth.stop)]
    repeated, wrapped, stopped = (
        decode_speculative(MODEL, head_proposer(MODEL, stack, policy, length), PROMPTS, length, Limits(12), policy).rows
        for policy in policies
    )
    for row, same, other in zip(repeated, wrapped, stopped, strict=True):
        assert row.passes == same.passes == other.passes


def test_a_row_that_wraps_around_does_not_depend_on_its_batch() -> None:
    policy, stack = Policy(past_depth=PastDepth.wrap_around), random_stack(SMALL, 2)
    together = decode_speculative(SMALL, head_proposer(SMALL, stack, policy, 4), PROMPTS, 4, Limits(24), policy).rows
    for prompt, row in zip(PROMPTS, together, strict=True):
        proposer = head_proposer(SMALL, stack, policy, 4)
        assert decode_speculative(SMALL, proposer, [prompt], 4, Limits(24), policy).rows[0].passes == row.passes


def test_a_draft_that_wraps_around_can_be_made_twice() -> None:
    """A recorded step drafts twice; the keys that the first draft left must not change the second."""

    class Twice:
        def __init__(self) -> None:
            self.proposer = head_proposer(SMALL, random_stack(SMALL, 2), policy, 5)
            self.start, self.read, self.keep = self.proposer.start, self.proposer.read, self.proposer.keep

        def draft(self, u_BK: torch.Tensor | None) -> object:
            self.proposer.draft(u_BK)
            return self.proposer.draft(u_BK)

    policy = Policy(past_depth=PastDepth.wrap_around)
    once = head_proposer(SMALL, random_stack(SMALL, 2), policy, 5)
    rows = [decode_speculative(SMALL, one, PROMPTS, 5, Limits(16), policy).rows for one in (once, Twice())]
    assert [row.passes for row in rows[0]] == [row.passes for row in rows[1]]


def test_policies_differ_past_the_depth() -> None:
    stack = random_stack(PAIR, 2)
    tokens = torch.randint(2, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    trace = Trace(Prompt(tokens[:8], "text", 0), tokens[8:], [1.0] * 72, [1.0] * 72)
    accepted = {}
    for past_depth in PastDepth:
        policy = Policy(past_depth=past_depth)
        drafts, counts = replay_lengths(PAIR, stack, [trace], 5, policy)
        accepted[past_depth] = counts[5][0].accepted_K.tolist()
        limits = [one.min_confidence for one in sweep_thresholds(drafts, policy, 5)]
        assert limits == ([0.0] if past_depth is PastDepth.wrap_around else [0.0, 0.2, 0.4, 0.6, 0.8])
    assert accepted[PastDepth.stop][2:] == [0, 0, 0]
    assert len({tuple(one) for one in accepted.values()}) == 3


def test_sampled_drafts_that_wrap_around_have_no_replay() -> None:
    wraps = DecodingConfig(past_depth=PastDepth.wrap_around, temperature=1.0, draft=DraftChoice.greedy)
    assert wraps.past_depth is PastDepth.wrap_around
    with pytest.raises(UserError, match=r"decoding.past_depth=wrap_around: .* replay cannot .*decoding.draft=greedy"):
        DecodingConfig(past_depth=PastDepth.wrap_around, temperature=1.0)
    with pytest.raises(UserError, match=r"decoding.min_confidence=0.5: .*wraps around"):
        DecodingConfig(past_depth=PastDepth.wrap_around, min_confidence=0.5)
    policy = replace(DRAWN["greedy drafts"], past_depth=PastDepth.wrap_around)
    trace, _ = decode_plainly(SMALL, random_stack(SMALL), PROMPTS[1], 1, policy, new=4, seed=0)
    assert replay_other_drafts(draft_traces(SMALL, random_stack(SMALL), [trace], 2, policy), policy) is None


def test_a_proposer_that_keeps_keys_refuses_a_policy_that_overwrites_them() -> None:
    policy, proposer = Policy(past_depth=PastDepth.wrap_around), MtpProposer(SMALL, random_stack(SMALL, 2))
    with pytest.raises(UserError, match=r"decoding.past_depth=wrap_around: .* 2 modules .*; take .*head_proposer"):
        decode_speculative(SMALL, proposer, [PROMPTS[0]], 4, Limits(4), policy)
