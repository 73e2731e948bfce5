"""Acceptance figures from the passes of prompts, and the greedy certificate."""

import numpy as np
import pytest

from mtptrain.decoding.results import VerifyPass
from mtptrain.evaluation.head_result import Interval, Totals
from mtptrain.evaluation.metrics import (
    acceptance_length,
    by_domain,
    by_position,
    paired_gain,
    paired_gain_by_domain,
    summarize,
    totals,
)
from mtptrain.replay.replay import Counts, count_passes


def passes(*accepted: int, draft_length: int = 3) -> list[VerifyPass]:
    return [VerifyPass(draft_length, count, count + 1) for count in accepted]


def counts(*accepted: int, draft_length: int = 3) -> Counts:
    return count_passes(passes(*accepted, draft_length=draft_length), draft_length)


def interval_of(prompts: list[Counts], groups: list[int]) -> Interval:
    interval = summarize(prompts, groups).interval
    assert interval is not None
    return interval


def test_acceptance_length_is_emitted_tokens_over_passes_of_all_prompts() -> None:
    assert acceptance_length([counts(3, 0), counts(1)]) == (4 + 1 + 2) / 3


def test_positions_are_conditional_on_the_one_before() -> None:
    figures = by_position([counts(3, 0, 1, 2)])
    assert figures.accepted == [3, 2, 1]
    assert figures.conditional == [3 / 4, 2 / 3, 1 / 2]
    assert figures.unconditional == [3 / 4, 2 / 4, 1 / 4]


def test_a_position_that_was_never_reached_has_no_conditional_rate() -> None:
    assert by_position([counts(0, 0, draft_length=2)]).conditional == [0.0, None]


def test_prompts_that_end_at_their_first_token_are_left_out() -> None:
    assert summarize([counts(1, 2), counts()], [0, 1]) == summarize([counts(1, 2)], [0])


def test_the_interval_of_a_gain_is_paired_by_prompt() -> None:
    """Prompts differ much from each other, the heads by a constant: the paired interval is narrow."""
    rng = np.random.default_rng(0)
    base, better = [], []
    for _ in range(40):
        level = int(rng.integers(0, 7))
        base.append(counts(*[level] * 10, draft_length=8))
        better.append(counts(*[level + 1] * 10, draft_length=8))
    gain = paired_gain(base, better, list(range(40)))
    assert gain.gain == 1.0
    assert np.allclose(gain.interval, 1.0, atol=1e-9)


def test_prompts_of_one_group_are_resampled_together() -> None:
    """Four copies of each prompt, in one group: no more certain than the prompts alone."""
    alone = [counts(*[level] * 5) for level in (0, 1, 1, 2, 3, 0, 2, 3)]
    copied = [one for one in alone for _ in range(4)]
    groups = [number // 4 for number in range(len(copied))]
    assert interval_of(copied, groups) == pytest.approx(interval_of(alone, list(range(8))))
    low, high = interval_of(copied, list(range(len(copied))))
    low_grouped, high_grouped = interval_of(copied, groups)
    assert high - low < 0.7 * (high_grouped - low_grouped)


def test_without_a_verify_pass_there_is_no_acceptance_to_report() -> None:
    """Every text ends at its first token."""
    nothing = [counts(), counts()]
    measured = summarize(nothing, [0, 1])
    assert (measured.acceptance_length, measured.interval, measured.passes, measured.emitted) == (None, None, 0, 0)
    assert measured.conditional == [None] * 3
    assert acceptance_length(nothing) is None
    assert paired_gain(nothing, nothing, [0, 1]) is None
    assert paired_gain_by_domain(nothing, nothing, [0, 1], ["a", "b"]) == {"a": None, "b": None}


def test_domains_are_summarized_apart() -> None:
    prompts = [counts(3, 3), counts(0, 0), counts(2, 2), counts(1, 0)]
    summaries = by_domain(prompts, [0, 1, 2, 3], ["code", "chat", "code", "chat"])
    assert list(summaries) == ["code", "chat"]
    assert summaries["code"].acceptance_length == (4 + 4 + 3 + 3) / 4
    assert sum(summary.passes for summary in summaries.values()) == totals(prompts).passes


def test_a_domain_without_passes_has_no_figures() -> None:
    prompts, groups, domains = [counts(3, 0), counts(), counts()], [0, 1, 2], ["code", "chat", "chat"]
    summaries = by_domain(prompts, groups, domains)
    assert summaries == {"code": summarize(prompts[:1], [0]), "chat": None}
    gains = paired_gain_by_domain(prompts, [counts(3, 1), counts(), counts()], groups, domains)
    assert gains["code"].gain == 0.5
    assert gains["chat"] is None


def test_counts_of_a_loop_are_whole_numbers() -> None:
    assert totals([counts(3, 0)]) == Totals(acceptance_length=2.5, passes=2, emitted=5)
    assert type(totals([counts(3, 0)]).passes) is int


def test_a_draft_that_was_cut_short_does_not_reach_its_missing_positions() -> None:
    counted = count_passes([VerifyPass(1, 1, 2), VerifyPass(3, 2, 3), VerifyPass(0, 0, 1)], 3)
    assert counted.drafted_K is not None
    assert counted.drafted_K.tolist() == [2, 1, 1]
    assert counted.reached_K.tolist() == [2, 1, 1]
    assert counted.accepted_K.tolist() == [2, 1, 0]
