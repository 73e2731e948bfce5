"""Replay of a text equals the loop that made it: exactly in greedy decoding, in distribution in sampled decoding."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from mtptrain.backbone.streams import run_backbone
from mtptrain.certificate.sampled import SampledRun, certify_pass_counts, sampled_run
from mtptrain.config import DraftChoice
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.penalties import Penalties, count_context
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_plain, decode_speculative
from mtptrain.evaluation.head_result import Interval
from mtptrain.evaluation.metrics import acceptance_length, summarize
from mtptrain.kernels.acceptance import Verification
from mtptrain.replay import drafts as drafts_module
from mtptrain.replay.drafts import ReplayDrafts, draft_traces
from mtptrain.replay.replay import count_passes, replay_all, replay_counts, replay_other_drafts, replay_passes
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt
from tests.replay.plain_loop import decode_plainly, draft_logits
from tests.tiny import random_stack, three_layers

# K draft steps, N anchors
MODEL = three_layers()
SAMPLED = Policy(temperature=0.8, top_k=12, top_p=0.95)
NONE, PENALTIES = Penalties(), Penalties(1.3, 0.4, -0.3)
MIN_P = Policy(temperature=0.8, min_p=0.02, penalties=PENALTIES)


def random_trace(prompt: int, new: int, seed: int) -> Trace:
    tokens = torch.randint(97, (prompt + new,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Trace(Prompt(tokens[:prompt], "text", seed), tokens[prompt:], [1.0] * new, [0.5] * new)


@pytest.mark.parametrize("policy", [Policy(), SAMPLED, replace(SAMPLED, draft=DraftChoice.greedy), MIN_P])
@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_of_a_padded_batch_equal_single_rollouts(
    policy: Policy, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every q, confidence, margin and entropy against its plain definition, at texts of different length."""
    monkeypatch.setattr(drafts_module, "LOGITS_A_CHUNK", 5 * 97)  # several chunks of the lm_head
    stack, steps = random_stack(MODEL, depth), 3
    traces = [random_trace(5, 9, 0), random_trace(11, 1, 1), random_trace(2, 4, 2)]
    for trace, drafts in zip(traces, draft_traces(MODEL, stack, traces, steps, policy), strict=True):
        size, text = len(trace.tokens) - 1, trace.prompt.tokens + trace.tokens
        assert drafts.q_KN.shape == drafts.confidence_KN.shape == (steps, size)
        assert (drafts.margin_KN is not None) == policy.draws_greedily
        with torch.inference_mode():
            streams_RSND, _ = run_backbone(MODEL, torch.tensor([text]))
            logits_KSV = draft_logits(MODEL, stack, text, steps, streams_RSND)
            p_SV = MODEL(input_ids=torch.tensor([text])).logits[0].softmax(-1)
        for n in range(size):
            anchor = len(trace.prompt.tokens) - 1 + n
            for step in range(1, steps + 1):
                if n + step > size:
                    assert drafts.q_KN[step - 1, n] == 0
                    continue
                logits_V = logits_KSV[step - 1, anchor]
                sizes = torch.tensor([[len(trace.prompt.tokens)], [anchor + step + 1]])
                context = count_context(torch.tensor([text]), *sizes, vocab_size=97)
                q = policy.proposal(logits_V[None], context)[0, text[anchor + step + 1]]
                # fp32 rounding of logits of order 10, through a softmax at temperature 0.8.
                assert drafts.q_KN[step - 1, n] == pytest.approx(float(q), rel=2e-3, abs=1e-6)
                if drafts.other_q_KN is not None:
                    q = policy.with_other_drafts.proposal(logits_V[None], context)[0, text[anchor + step + 1]]
                    assert drafts.other_q_KN[step - 1, n] == pytest.approx(float(q), rel=2e-3, abs=1e-6)
                confidence = float(logits_V.softmax(-1).max())
                assert drafts.confidence_KN[step - 1, n] == pytest.approx(confidence, rel=2e-3)
                if drafts.margin_KN is not None:
                    adjusted_V = policy.adjust(logits_V[None], context)[0].tolist()
                    own = adjusted_V.pop(text[anchor + step + 1])
                    assert drafts.margin_KN[step - 1, n] == pytest.approx(abs(own - max(adjusted_V)), abs=1e-4)
            entropy = float(torch.special.entr(p_SV[anchor + 1]).sum())
            assert drafts.entropy_N[n] == pytest.approx(entropy, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("depth", "min_confidence", "penalties"),
    [(1, 0.0, NONE), (2, 0.0, NONE), (1, 0.12, NONE), (2, 0.0, PENALTIES), (1, 0.12, PENALTIES)],
)
def test_greedy_replay_equals_the_loop_pass_by_pass(depth: int, min_confidence: float, penalties: Penalties) -> None:
    policy = Policy(min_confidence=min_confidence, penalties=penalties)
    stack, length = random_stack(MODEL, depth), 3
    trace, passes = decode_plainly(MODEL, stack, [5, 17, 40, 3, 8, 8, 21], length, policy, new=24, seed=0)
    (drafts,) = draft_traces(MODEL, stack, [trace], length + 1, policy, free_running=min_confidence > 0)
    assert replay_passes(drafts, policy, length) == passes
    expected, counted = replay_counts(drafts, policy)[length], count_passes(passes, length)
    assert expected.passes == counted.passes
    assert expected.emitted == counted.emitted
    for name in ("drafted_K", "reached_K", "accepted_K"):
        assert getattr(expected, name).tolist() == getattr(counted, name).tolist()
    if min_confidence:
        assert {record.drafted for record in passes[:-3]} > {length}, "the threshold must stop some drafts, not all"


@pytest.mark.parametrize(
    "policy",
    [
        SAMPLED,
        replace(SAMPLED, verification=Verification.block, min_confidence=0.1),
        replace(MIN_P, min_confidence=0.1),
    ],
    ids=["token", "block, stopped", "penalised, stopped"],
)
def test_passes_of_a_sampling_loop_follow_their_distribution(policy: Policy) -> None:
    """Over many texts, passes, drafted and accepted tokens agree with the expectations of replay."""
    stack, length, new = random_stack(MODEL), 2, 6
    runs, differences = [], []
    for seed in range(12):
        trace, passes = decode_plainly(MODEL, stack, [seed, 3, 8], length, policy, new, seed)
        (drafts,) = draft_traces(MODEL, stack, [trace], length, policy, free_running=True)
        runs.append(sampled_run("h", length, len(passes), drafts, policy))
        expected, counted = replay_counts(drafts, policy)[length], count_passes(passes, length)
        assert expected.drafted_K is not None
        assert counted.drafted_K is not None
        pairs = [(expected.drafted_K, counted.drafted_K), (expected.accepted_K, counted.accepted_K)]
        differences.append(np.concatenate([count - mean for mean, count in pairs]))
    result = certify_pass_counts(runs)
    assert result.passed
    assert result.tests[0].standard_error > 0
    error = np.std(differences, axis=0) / np.sqrt(len(runs))
    assert (np.abs(np.mean(differences, axis=0)) <= 4 * error + 1e-9).all()


SMALL = three_layers(vocab_size=7)
PROMPTS = torch.randint(7, (40, 4), generator=torch.Generator().manual_seed(0)).tolist()
LIMITS, LENGTH = Limits(16), 4
TOKEN = Policy(temperature=2.0)
BLOCK = replace(TOKEN, verification=Verification.block)
STOPPED = replace(BLOCK, min_confidence=0.4)
PENALISED = replace(TOKEN, min_p=0.05, penalties=Penalties(1.5, 0.4, -0.3))


@cache
def replayed_interval(policy: Policy) -> Interval:
    """Return the 95 % interval of replay's acceptance length, from one plain text a prompt."""
    groups = list(range(len(PROMPTS)))
    rows = decode_plain(SMALL, PROMPTS, LIMITS, policy, groups).rows
    traces = [
        Trace(Prompt(tokens, "text", number), row.tokens, row.gaps, row.probabilities)
        for number, (tokens, row) in enumerate(zip(PROMPTS, rows, strict=True))
    ]
    drafts = draft_traces(SMALL, random_stack(SMALL), traces, LENGTH, policy, free_running=True)
    return summarize([replay_counts(one, policy)[LENGTH] for one in drafts], groups).interval


@cache
def looped_length(policy: Policy) -> float:
    """Return the acceptance length of the real loop over other seeds, six for each prompt, all in one batch."""
    seeds = list(range(1000, 1000 + 6 * len(PROMPTS)))
    proposer = MtpProposer(SMALL, random_stack(SMALL))
    rows = decode_speculative(SMALL, proposer, 6 * PROMPTS, LENGTH, LIMITS, policy, seeds).rows
    return acceptance_length([count_passes(row.passes, LENGTH) for row in rows])


@pytest.mark.parametrize("policy", [TOKEN, BLOCK, STOPPED, PENALISED], ids=["token", "block", "stopped", "penalised"])
def test_the_mean_of_the_sampling_loop_lies_in_the_interval_of_replay(policy: Policy) -> None:
    low, high = replayed_interval(policy)
    assert low <= looped_length(policy) <= high


@pytest.mark.parametrize(("policy", "other"), [(TOKEN, BLOCK), (BLOCK, TOKEN), (BLOCK, STOPPED)])
def test_the_loop_of_another_policy_lies_outside_the_interval(policy: Policy, other: Policy) -> None:
    low, high = replayed_interval(policy)
    assert not low <= looped_length(other) <= high


def test_thresholds_are_replayed_from_one_rollout() -> None:
    stack, traces = random_stack(MODEL), [random_trace(6, 20, seed) for seed in range(3)]
    drafts = draft_traces(MODEL, stack, traces, 4, Policy(), free_running=True)
    for threshold in (0.0, 0.05, 0.2, 1.0):
        policy = Policy(min_confidence=threshold)
        alone = draft_traces(MODEL, stack, traces, 4, policy, free_running=True)
        for together, apart in zip(replay_all(drafts, policy)[4], replay_all(alone, policy)[4], strict=True):
            assert together.passes == apart.passes
            assert together.drafted_K is not None
            assert apart.drafted_K is not None
            assert together.drafted_K.tolist() == apart.drafted_K.tolist()
    nothing = replay_all(drafts, Policy(min_confidence=1.0))[4][0]
    assert nothing.passes == 19
    assert not np.any(nothing.drafted_K)


def test_drafted_tokens_under_a_threshold_are_unknown_for_stacked_modules() -> None:
    (drafts,) = draft_traces(MODEL, random_stack(MODEL, 2), [random_trace(4, 9, 0)], 3, Policy(), free_running=True)
    counts = replay_counts(drafts, Policy(min_confidence=0.1))[3]
    assert counts.drafted_K is None
    assert counts.reached_K.shape == (3,)
    with pytest.raises(ValueError, match="with the head's own drafts known"):
        replay_passes(drafts, Policy(min_confidence=0.1), 3)


@pytest.mark.parametrize("policy", [SAMPLED, replace(MIN_P, min_confidence=0.1)])
def test_the_other_kind_of_draft_is_replayed_from_the_same_rollout(policy: Policy) -> None:
    stack, traces = random_stack(MODEL), [random_trace(6, 20, seed) for seed in range(3)]
    other = policy.with_other_drafts
    together = replay_other_drafts(draft_traces(MODEL, stack, traces, 3, policy), policy)
    apart = replay_all(draft_traces(MODEL, stack, traces, 3, other), other)
    assert [one.accepted_K.tolist() for one in together[3]] == [one.accepted_K.tolist() for one in apart[3]]
    assert replay_other_drafts(draft_traces(MODEL, stack, traces, 3, Policy()), Policy()) is None


def test_a_text_of_one_token_has_no_passes() -> None:
    (drafts,) = draft_traces(MODEL, random_stack(MODEL), [random_trace(4, 1, 0)], 3, Policy())
    assert replay_passes(drafts, Policy(), 3) == []
    assert replay_counts(drafts, Policy())[3].passes == 0


def test_replay_walks_from_anchor_to_anchor() -> None:
    """Text of 6: two top-1 matches at anchor 0, then none at 3, then one at 4, the last token."""
    top1_match_KN = np.zeros((2, 5))
    top1_match_KN[:, 0] = top1_match_KN[0, 4] = 1
    drafts = ReplayDrafts(np.ones(5), top1_match_KN, np.ones((2, 5)), None, np.zeros(5))
    counts = [(p.drafted, p.accepted, p.emitted) for p in replay_passes(drafts, Policy(), 2)]
    assert counts == [(2, 2, 3), (2, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_expected_counts_of_certain_matches_are_those_of_the_passes(seed: int) -> None:
    top1_match_KN = (np.random.default_rng(seed).random((8, 30)) < 0.7).astype(np.float64)
    drafts = ReplayDrafts(np.ones(30), top1_match_KN, np.ones((8, 30)), None, np.zeros(30))
    for length, expected in replay_counts(drafts, Policy()).items():
        counted = count_passes(replay_passes(drafts, Policy(), length), length)
        assert (expected.passes, expected.emitted) == (counted.passes, counted.emitted)
        for name in ("drafted_K", "reached_K", "accepted_K"):
            assert getattr(expected, name).tolist() == getattr(counted, name).tolist()


def test_a_loop_with_an_improbable_number_of_passes_fails() -> None:
    right = [SampledRun("h", 2, 10, 10.2, 1.0)] * 30
    assert certify_pass_counts(right).passed
    assert not certify_pass_counts([*right, *[SampledRun("h", 3, 12, 10.2, 1.0)] * 30]).passed


def test_certain_passes_must_be_met_exactly() -> None:
    assert certify_pass_counts([SampledRun("h", 2, 10, 10.0, 0.0)]).passed
    assert not certify_pass_counts([SampledRun("h", 2, 11, 10.0, 0.0)]).passed
