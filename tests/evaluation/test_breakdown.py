"""Buckets of drafted tokens against plain sums, and their sums against the totals of replay."""

from dataclasses import replace

import numpy as np
import pytest

from mtptrain.config import DraftChoice
from mtptrain.data.tokenizer import train_tokenizer
from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.breakdown import break_down, bucket_names, calibrate, classify, token_classes
from mtptrain.evaluation.head_result import BucketKind
from mtptrain.kernels.acceptance import Verification
from mtptrain.replay.drafts import ReplayDrafts
from mtptrain.replay.replay import replay_all, trace_chances
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt

# K draft steps, N anchors
TOKENIZER = train_tokenizer(["def rule(x):\n    return x * 12\n"] * 20, 280)
SAMPLED = Policy(temperature=1.0)
POLICIES = [SAMPLED, replace(SAMPLED, verification=Verification.block), replace(SAMPLED, min_confidence=0.3)]


def some_text(domain: str, prompt: int, new: int, steps: int, seed: int) -> tuple[Trace, ReplayDrafts]:
    """Random tokens, and random drafts on them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 270, prompt + new).tolist()
    trace = Trace(Prompt(tokens[:prompt], domain, seed), tokens[prompt:], [1.0] * new, [])
    p_N, entropy_N = rng.random(new - 1) * 0.9 + 0.1, rng.random(new - 1) * 5
    q_KN, confidence_KN = rng.random((2, steps, new - 1))
    inside_KN = np.arange(steps)[:, None] + np.arange(new - 1) < new - 1
    return trace, ReplayDrafts(p_N, q_KN * inside_KN, confidence_KN * inside_KN, None, entropy_N)


TEXTS = [some_text("code", 5, 30, 4, 0), some_text("chat", 70, 90, 4, 1), some_text("code", 40, 1, 4, 2)]
TRACES, DRAFTS = [trace for trace, _ in TEXTS], [drafts for _, drafts in TEXTS]


@pytest.mark.parametrize("policy", POLICIES, ids=["token", "block", "stopped"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_buckets_of_every_kind_add_up_to_the_totals_of_replay(policy: Policy, length: int) -> None:
    counts = replay_all(DRAFTS, policy)[length]
    reached, accepted = (sum(getattr(one, name).sum() for one in counts) for name in ("reached_K", "accepted_K"))
    breakdown = break_down(TRACES, DRAFTS, policy, length, TOKENIZER)
    assert set(breakdown.by) == set(BucketKind)
    for buckets in [*breakdown.by.values(), [breakdown.totals]]:
        assert sum(one.reached for one in buckets) == pytest.approx(reached, rel=1e-12)
        assert sum(one.accepted for one in buckets) == pytest.approx(accepted, rel=1e-12)
    for buckets in breakdown.by.values():
        assert sum(one.lost_share for one in buckets) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=["token", "block"])
def test_drafted_tokens_are_accepted_or_lost(policy: Policy) -> None:
    drafted = sum(one.drafted_K.sum() for one in replay_all(DRAFTS, policy)[4] if one.drafted_K is not None)
    totals = break_down(TRACES, DRAFTS, policy, 4, TOKENIZER).totals
    assert totals.accepted + totals.lost == pytest.approx(drafted, rel=1e-12)


def test_a_bucket_is_the_plain_sum_over_its_steps_and_anchors() -> None:
    """Entropy between 1 and 2 nats, and inside words, step by step."""
    by_kind = break_down(TRACES, DRAFTS, SAMPLED, 3, TOKENIZER).by
    reached = dict.fromkeys((BucketKind.entropy, BucketKind.token_class, BucketKind.generated), 0.0)
    for trace, drafts in TEXTS:
        chances = trace_chances(drafts, SAMPLED)
        text = trace.prompt.tokens + trace.tokens
        classes = token_classes(TOKENIZER, text, 0)
        for n in range(len(drafts.p_N)):
            for k in range(1, 4):
                if n + k > len(drafts.p_N):
                    continue
                weight = chances.visit_LN[2, n] * chances.begun_KN[k - 1, n]
                reached[BucketKind.entropy] += weight * (1 <= drafts.entropy_N[n + k - 1] < 2)
                reached[BucketKind.token_class] += weight * (classes[len(trace.prompt.tokens) + n + k] == "inside word")
                reached[BucketKind.generated] += weight * (16 <= n + 1 < 64)
    buckets = {BucketKind.entropy: "1 to 2", BucketKind.token_class: "inside word", BucketKind.generated: "16 to 64"}
    for kind, bucket in buckets.items():
        (one,) = [one for one in by_kind[kind] if one.bucket == bucket]
        assert one.reached == pytest.approx(reached[kind], rel=1e-9)


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        ("def", "\n", "word start"),
        (" rule", "def", "word start"),
        ("ule", "def r", "inside word"),
        ("_name", "my", "inside word"),
        (" 12", "= ", "digits"),
        ("12", "x", "digits"),
        ("):", "x", "punctuation"),
        (" =", "x", "punctuation"),
        (" ", "x", "whitespace"),
        ("\n", "x", "whitespace"),
        ("\n    ", "x:", "indentation"),
        ("    ", "x:\n", "indentation"),
        ("\t", "x:\n  ", "indentation"),
        ("    ", "x:", "whitespace"),
        ("\ufffd", "x", "part of a character"),
        ("", "x", "part of a character"),
        ("\u00e9t", " ", "word start"),
    ],
)
def test_a_token_is_classed_by_its_text(text: str, before: str, expected: str) -> None:
    assert classify(text, before) == expected


def test_classes_are_read_off_the_tokenizers_text() -> None:
    tokens = TOKENIZER.encode("def rule(x):\n    return x", add_special_tokens=False).ids
    classes = token_classes(TOKENIZER, tokens, 0)
    assert len(classes) == len(tokens)
    assert classes[0] == "word start"
    assert {"punctuation", "indentation"} <= set(classes)
    assert token_classes(TOKENIZER, tokens, 5) == classes[5:]


def test_buckets_are_named_by_their_edges() -> None:
    assert bucket_names([0.5, 2, 10]) == ["below 0.5", "0.5 to 2", "2 to 10", "10 and more"]


def test_calibration_is_the_plain_mean_over_verified_steps() -> None:
    """ECE and one bin, step by step."""
    calibration = calibrate(DRAFTS, SAMPLED, 3)
    sums = np.zeros((10, 3))
    for drafts in DRAFTS:
        chances = trace_chances(drafts, SAMPLED)
        for n in range(len(drafts.p_N)):
            for k in range(min(3, len(drafts.p_N) - n)):
                weight = chances.visit_LN[2, n] * chances.begun_KN[k, n]
                confidence = drafts.confidence_KN[k, n]
                accepted = min(1.0, drafts.q_KN[k, n] / drafts.p_N[n + k])
                sums[int(confidence * 10)] += weight * np.array([1, confidence, accepted])
    assert [one.count for one in calibration.bins] == pytest.approx(sums[:, 0])
    assert [one.acceptance for one in calibration.bins] == pytest.approx(sums[:, 2] / sums[:, 0])
    ece = np.abs(sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum()
    assert calibration.ece == pytest.approx(ece)


def test_a_head_as_accurate_as_its_confidence_is_calibrated() -> None:
    rng = np.random.default_rng(6)
    confidence_KN = rng.random((1, 40_000))
    top1_match_KN = (rng.random((1, 40_000)) < confidence_KN).astype(np.float64)
    policy = Policy(temperature=1.0, draft=DraftChoice.greedy)
    honest = ReplayDrafts(np.ones(40_000), top1_match_KN, confidence_KN, None, np.zeros(40_000))
    # A bin of 2000 and more steps knows its rate to 1 %.
    assert calibrate([honest], policy, 1).ece < 0.02
    boastful = replace(honest, confidence_KN=np.sqrt(confidence_KN))
    assert calibrate([boastful], policy, 1).ece == pytest.approx(2 / 3 - 1 / 2, abs=0.03)


def test_nothing_verified_has_no_calibration() -> None:
    calibration = calibrate([DRAFTS[2]], SAMPLED, 3)
    assert calibration.ece is None
    assert calibration.bins == []
