"""Acceptance figures: pure functions on the counts of prompts, real or expected."""

# P prompts, K draft length

from __future__ import annotations

from typing import Any

import numpy as np

from mtptrain.evaluation.bootstrap import difference, interval, resampled_totals
from mtptrain.evaluation.counts import Counts


def acceptance_length(prompts: list[Counts]) -> float:
    """Tokens emitted a verify pass, the verifier's own token included: 1 = no gain, K + 1 = ceiling."""
    return sum(counts.emitted for counts in prompts) / sum(counts.passes for counts in prompts)


def by_position(prompts: list[Counts]) -> dict[str, list[Any]]:
    """Drafted and accepted tokens at each position, and the two acceptance rates.

    `conditional`: accepted at k of those whose position k - 1 was accepted; None where that never happened.
    `unconditional`: accepted at k of all drafts that had a position k; None where that is not known.
    """
    reached = _numbers(np.sum([counts.reached_K for counts in prompts], axis=0))
    accepted = _numbers(np.sum([counts.accepted_K for counts in prompts], axis=0))
    known = [counts.drafted_K for counts in prompts if counts.drafted_K is not None]
    drafted = _numbers(np.sum(known, axis=0)) if len(known) == len(prompts) else [None] * len(accepted)
    return {
        "drafted": drafted,
        "reached": reached,
        "accepted": accepted,
        "conditional": [a / r if r else None for a, r in zip(accepted, reached, strict=True)],
        "unconditional": [a / d if d else None for a, d in zip(accepted, drafted, strict=True)],
    }


def totals(prompts: list[Counts]) -> dict[str, Any]:
    """`acceptance_length` (None without passes), `passes` and `emitted` of some prompts."""
    passes, emitted = _numbers(np.sum([(counts.passes, counts.emitted) for counts in prompts], axis=0))
    return {"acceptance_length": emitted / passes if passes else None, "passes": passes, "emitted": emitted}


def _numbers(values: np.ndarray) -> list[float]:
    """Plain numbers, whole ones as int: counts of a loop read as counts."""
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def summarize(prompts: list[Counts], groups: list[int]) -> dict[str, Any]:
    """Acceptance of one head at one draft length, with a 95 % bootstrap interval over groups of prompts.

    Args:
        prompts: counts of each prompt; a prompt without passes (one emitted token) adds nothing.
        groups: the group of each prompt.
    """
    return {
        **totals(prompts),
        "interval": interval(_resampled_lengths(prompts, groups)),
        **by_position(prompts),
    }


def by_domain(prompts: list[Counts], groups: list[int], domains: list[str]) -> dict[str, dict[str, Any]]:
    """`summarize` for the prompts of each domain, in the order of their first prompts."""
    return {
        domain: summarize([prompts[i] for i in rows], [groups[i] for i in rows])
        for domain, rows in domain_rows(domains).items()
    }


def domain_rows(domains: list[str]) -> dict[str, list[int]]:
    """Numbers of the prompts of each domain, in the order of their first prompts."""
    rows: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        rows.setdefault(domain, []).append(number)
    return rows


def paired_gain(base: list[Counts], other: list[Counts], groups: list[int]) -> dict[str, Any]:
    """Difference of acceptance length, `other` minus `base`, over the same prompts.

    Returns:
        `gain`, its 95 % bootstrap `interval` over groups, and `detectable`: the smallest true difference that these
        prompts would have shown with 80 % power.
    """
    resampled_R = _resampled_lengths(other, groups) - _resampled_lengths(base, groups)
    return difference(acceptance_length(other) - acceptance_length(base), resampled_R)


def paired_position_gain(base: list[Counts], other: list[Counts], groups: list[int]) -> list[dict[str, Any] | None]:
    """Difference of conditional acceptance at each position, as `paired_gain`; None where one was never reached."""
    (old_K, old_RK), (new_K, new_RK) = (_conditional(prompts, groups) for prompts in (base, other))
    known_K = np.isfinite(new_RK - old_RK).all(0)
    return [
        difference(float(new_K[k] - old_K[k]), new_RK[:, k] - old_RK[:, k]) if known_K[k] else None
        for k in range(len(known_K))
    ]


def _resampled_lengths(prompts: list[Counts], groups: list[int]) -> np.ndarray:
    counts_PF = np.array([(counts.passes, counts.emitted) for counts in prompts], dtype=np.float64)
    told_P = counts_PF[:, 0] > 0
    told_groups = [group for group, told in zip(groups, told_P, strict=True) if told]
    passes_R, emitted_R = resampled_totals(counts_PF[told_P], told_groups).T
    return emitted_R / passes_R


def _conditional(prompts: list[Counts], groups: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Conditional acceptance by position: the value [K] and its resamples [R, K]."""
    counts_PF = np.array([np.concatenate([counts.accepted_K, counts.reached_K]) for counts in prompts])
    with np.errstate(invalid="ignore"):
        accepted_K, reached_K = np.split(counts_PF.sum(0), 2)
        accepted_RK, reached_RK = np.split(resampled_totals(counts_PF, groups), 2, axis=1)
        return accepted_K / reached_K, accepted_RK / reached_RK
