"""Acceptance figures from records."""

import numpy as np

from mtptrain.data.prompts import Prompt
from mtptrain.decoding.records import Decoded, VerifyPass
from mtptrain.evaluation.certify import LoopRun, certify
from mtptrain.evaluation.metrics import acceptance_length, by_position, paired_gain, summarize
from mtptrain.evaluation.replay import replay_passes
from mtptrain.evaluation.trace import Trace


def passes(*accepted: int, draft_length: int = 3) -> list[VerifyPass]:
    return [VerifyPass(draft_length, count, count + 1) for count in accepted]


def test_acceptance_length_is_emitted_tokens_over_passes_of_all_prompts() -> None:
    assert acceptance_length([passes(3, 0), passes(1)]) == (4 + 1 + 2) / 3


def test_positions_are_conditional_on_the_one_before() -> None:
    figures = by_position([passes(3, 0, 1, 2)], 3)
    assert figures["accepted"] == [3, 2, 1]
    assert figures["conditional"] == [3 / 4, 2 / 3, 1 / 2]
    assert figures["unconditional"] == [3 / 4, 2 / 4, 1 / 4]


def test_a_position_that_was_never_reached_has_no_conditional_rate() -> None:
    assert by_position([passes(0, 0)], 2)["conditional"] == [0.0, None]


def test_prompts_that_end_at_their_first_token_are_left_out() -> None:
    assert summarize([passes(1, 2), []], 3) == summarize([passes(1, 2)], 3)


def test_the_interval_of_a_gain_is_paired_by_prompt() -> None:
    """Prompts differ much from each other, the heads by a constant: the paired interval is narrow."""
    rng = np.random.default_rng(0)
    base, better = [], []
    for _ in range(40):
        level = int(rng.integers(0, 7))
        base.append(passes(*[level] * 10, draft_length=8))
        better.append(passes(*[level + 1] * 10, draft_length=8))
    gain = paired_gain(base, better)
    assert gain["gain"] == 1.0
    assert np.allclose(gain["interval"], 1.0, atol=1e-9)


def test_replay_walks_from_anchor_to_anchor() -> None:
    """Prompt of 2, text of 6: anchors 1 (2 hits, accepted), then 4 (none), then 5 (1 hit, the last token)."""
    trace = Trace(Prompt([7, 7], "text", 0), [1, 2, 3, 4, 5, 6], [1.0] * 6, [])
    hit_KS = np.zeros((2, 8), dtype=bool)
    hit_KS[:, 1] = True
    hit_KS[0, 5] = True
    counts = [(p.drafted, p.accepted, p.emitted) for p in replay_passes(hit_KS, trace, 2)]
    assert counts == [(2, 2, 3), (2, 0, 1), (1, 1, 1)]


def run(plain: list[int], loop: list[int], gap: float, replayed: list[VerifyPass]) -> LoopRun:
    return LoopRun("h", 0, 2, Decoded(plain, [gap] * len(plain)), Decoded(loop, [gap] * len(loop), passes(1)), replayed)


def test_a_certificate_needs_identity_and_equal_counts() -> None:
    assert certify([run([1, 2], [1, 2], 1.0, passes(1))], "float32")["passed"]
    assert not certify([run([1, 2], [1, 3], 1.0, passes(1))], "float32")["passed"]
    assert not certify([run([1, 2], [1, 2], 1.0, passes(0))], "float32")["passed"]


def test_a_numerical_tie_is_reported_and_not_held_against_the_head() -> None:
    result = certify([run([1, 2], [1, 3], 1e-5, passes(1))], "float32")
    assert result["passed"]
    assert result["greedy_identity"]["identical"] == 0
    assert result["greedy_identity"]["near_ties"] == [
        {"head": "h", "prompt": 0, "draft_length": 2, "position": 1, "gap": 1e-5}
    ]
