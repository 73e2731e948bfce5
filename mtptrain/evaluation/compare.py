"""Comparison of two settings on the same traces: paired gains, and a verdict in words.

A setting is one head, or the heads of several runs that differ in their seed. One head against one has the bootstrap of
`metrics.py`; with several runs on a side, intervals hold both sources of variation, see `crossed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtptrain.evaluation.comparison_result import NO_PASSES, HeadComparison, PromptGains, SettingDifference
from mtptrain.evaluation.head_result import Gain
from mtptrain.evaluation.metrics import domain_rows, have_passes, paired_gain, paired_gain_by_domain
from mtptrain.evaluation.runs import gain_of_runs, position_gain_of_runs
from mtptrain.replay.replay import Counts
from mtptrain.traces.prompts import Prompt

CountsByLength = dict[int, list[Counts]]  # counts of every prompt, by draft length
Runs = list[CountsByLength]  # of the runs of one setting


def compare_heads(names: tuple[str, str], base: Runs, other: Runs, prompts: list[Prompt]) -> HeadComparison:
    """Return the gains of `other` over `base`, on all prompts and by domain.

    Args:
        names: of base and other.
        base: counts of every run of the base on the traces.
        other: the same of the other setting, on the same traces.
        prompts: of the traces.
    """
    pooled = compare_prompts(names, base, other, prompts)
    domains = {
        domain: _compare_domain(names, _take(base, rows), _take(other, rows), [prompts[i] for i in rows])
        for domain, rows in domain_rows([prompt.domain for prompt in prompts]).items()
    }
    at_longest = {domain: gains and gains.gain[max(base[0])] for domain, gains in domains.items()}
    worse = [domain for domain, gain in at_longest.items() if gain and gain.is_clear_loss]
    warning = f"; WORSE on {', '.join(worse)}" if worse and len(domains) > 1 else ""
    return HeadComparison(
        base=names[0],
        other=names[1],
        prompts=pooled.prompts,
        gain=pooled.gain,
        gain_by_position=pooled.gain_by_position,
        verdict=pooled.verdict + warning,
        domains=domains,
        worse_on=worse,
    )


def compare_prompts(names: tuple[str, str], base: Runs, other: Runs, prompts: list[Prompt]) -> PromptGains:
    """Return the gains of `other` on some prompts."""
    groups, longest = [prompt.group for prompt in prompts], max(base[0])
    gain = {k: gain_of_runs(_at(base, k), _at(other, k), groups) for k in base[0]}
    return PromptGains(
        prompts=len(prompts),
        gain=gain,
        gain_by_position=position_gain_of_runs(_at(base, longest), _at(other, longest), groups),
        verdict=gain_sentence(names, gain[longest], longest),
    )


def _compare_domain(names: tuple[str, str], base: Runs, other: Runs, prompts: list[Prompt]) -> PromptGains | None:
    """Return `compare_prompts`; None if no text of the domain needed a pass."""
    return compare_prompts(names, base, other, prompts) if have_passes(base[0][max(base[0])]) else None


def _take(runs: Runs, rows: list[int]) -> Runs:
    return [{k: [of_prompts[i] for i in rows] for k, of_prompts in counts.items()} for counts in runs]


def _at(runs: Runs, length: int) -> list[list[Counts]]:
    return [counts[length] for counts in runs]


def gain_sentence(names: tuple[str, str], gain: Gain | None, draft_length: int) -> str:
    """Return one sentence about the gain at one draft length."""
    if gain is None:
        return NO_PASSES
    base, other = names
    low, high = gain.interval
    at = f"at K={draft_length}"
    if gain.is_clear:
        return f"{other} accepts {gain.gain:.2f} more tokens a pass than {base} {at} ({low:.2f} to {high:.2f})"
    if gain.is_clear_loss:
        return f"{other} accepts {-gain.gain:.2f} fewer tokens a pass than {base} {at} ({-high:.2f} to {-low:.2f})"
    return (
        f"no evidence that {other} and {base} differ: {gain.gain:+.2f} tokens a pass ({low:+.2f} to {high:+.2f}) {at}; "
        f"these prompts would have shown {gain.detectable:.2f}"
    )


def compare_with_stock(
    replays: dict[str, CountsByLength], prompts: list[Prompt]
) -> tuple[dict[int, Gain | None] | None, dict[str, Gain | None] | None]:
    """Return the gain of the trained over the stock head by K, and by domain at the longest K; None without both."""
    if not {"stock", "trained"} <= set(replays):
        return None, None
    stock, trained = replays["stock"], replays["trained"]
    groups, longest = [prompt.group for prompt in prompts], max(stock)
    gain = {k: paired_gain(stock[k], trained[k], groups) for k in stock}
    domains = [prompt.domain for prompt in prompts]
    return gain, paired_gain_by_domain(stock[longest], trained[longest], groups, domains)


def differing_settings(heads: Sequence[Sequence[Mapping[str, Any] | None]]) -> list[SettingDifference]:
    """Return the settings that are not the same in all runs, in their order.

    Args:
        heads: of every compared head, the training settings of its runs by name; None for the stock head.
    """
    known = [settings for runs in heads for settings in runs if settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings)
    differing = [name for name in names if any(one.get(name) != known[0].get(name) for one in known)]
    return [SettingDifference(name, [_values(runs, name) for runs in heads]) for name in differing]


def _values(runs: Sequence[Mapping[str, Any] | None], name: str) -> str | None:
    """Return the different values of a setting in the runs of a head, as on the command line."""
    values = [settings.get(name) for settings in runs if settings is not None]
    shown = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return ", ".join(dict.fromkeys(shown)) or None
