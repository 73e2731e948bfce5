"""Acceptance of a setting from the counts of one run, by bootstrap, or of several, by `crossed.py`."""

# K draft length, k position in the draft, S runs, P prompts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mtptrain.evaluation.crossed import Setting, crossed_gain, crossed_interval
from mtptrain.evaluation.head_result import Acceptance, Gain
from mtptrain.evaluation.metrics import (
    domain_rows,
    draft_length,
    have_passes,
    lengths_of,
    paired_gain,
    paired_position_gain,
    summarize,
)
from mtptrain.replay.replay import Counts

RunCounts = list[list[Counts]]  # counts of every prompt at one draft length, run by run


def summarize_runs(runs: RunCounts, groups: list[int]) -> Acceptance:
    """Return the acceptance of a setting at one draft length: `summarize` for one run.

    Of several runs, the acceptance length is their mean, with an interval over runs and prompts; counts are sums, and
    shares by position are ratios of these.

    Args:
        runs: counts of every prompt, run by run.
        groups: the group of every prompt.
    """
    if len(runs) == 1:
        return summarize(runs[0], groups)
    pooled = summarize([counts for run in runs for counts in run], groups * len(runs))
    if not all(map(have_passes, runs)):
        return replace(pooled, acceptance_length=None, interval=None)
    (setting,) = _lengths([runs], groups)
    return replace(pooled, acceptance_length=setting.mean, interval=crossed_interval(setting, lengths_of(runs[0])))


def runs_by_domain(runs: RunCounts, groups: list[int], domains: list[str]) -> dict[str, Acceptance | None]:
    """Return `summarize_runs` for the prompts of each domain; None without passes."""
    summaries: dict[str, Acceptance | None] = {}
    for domain, rows in domain_rows(domains).items():
        of_domain = [[run[i] for i in rows] for run in runs]
        has_passes = have_passes(of_domain[0])
        summaries[domain] = summarize_runs(of_domain, [groups[i] for i in rows]) if has_passes else None
    return summaries


def gain_of_runs(base: RunCounts, other: RunCounts, groups: list[int]) -> Gain | None:
    """Return the difference of acceptance length on the same prompts, `other` minus `base`; None without passes."""
    if len(base) == len(other) == 1:
        return paired_gain(base[0], other[0], groups)
    if not all(map(have_passes, [*base, *other])):
        return None
    old, new = _lengths([base, other], groups)
    return crossed_gain(old, new, most=draft_length(base[0]))


def position_gain_of_runs(base: RunCounts, other: RunCounts, groups: list[int]) -> list[Gain | None]:
    """Return the difference of conditional acceptance at each position; None if too few drafts reached it."""
    if len(base) == len(other) == 1:
        return paired_position_gain(base[0], other[0], groups)
    at_positions = [_position([base, other], k, groups) for k in range(len(base[0][0].reached_K))]
    return [pair and crossed_gain(*pair, most=1.0) for pair in at_positions]


def _lengths(sides: list[RunCounts], groups: list[int]) -> list[Setting]:
    return _settings(sides, lambda counts: (counts.emitted, counts.passes), groups)


def _position(sides: list[RunCounts], k: int, groups: list[int]) -> tuple[Setting, Setting] | None:
    """Return two settings of the acceptance at a position; None if a run never reached it."""
    if not all(any(counts.reached_K[k] > 0 for counts in run) for runs in sides for run in runs):
        return None
    old, new = _settings(sides, lambda counts: (counts.accepted_K[k], counts.reached_K[k]), groups)
    return old, new


def _settings(
    sides: list[RunCounts], ratio: Callable[[Counts], tuple[float, float]], groups: list[int]
) -> list[Setting]:
    """Return the pseudo-values of settings on the same prompts.

    A prompt that no run measures is left out, as in the bootstrap: its pseudo-values would be the mean itself, and
    narrow the interval.

    Args:
        sides: the runs of each setting.
        ratio: returns numerator and denominator of a prompt.
        groups: the group of every prompt.
    """
    parts = [np.array([[ratio(counts) for counts in run] for run in runs], dtype=np.float64) for runs in sides]
    kept = [i for i in range(len(groups)) if any((part_SP2[:, i, 1] > 0).any() for part_SP2 in parts)]
    chosen = [groups[i] for i in kept]
    return [Setting.of(part_SP2[:, kept, 0], part_SP2[:, kept, 1], chosen) for part_SP2 in parts]
