"""Acceptance figures and their bootstrap intervals: pure functions on the counts of prompts, real or expected."""

# P prompts, G groups, R resamples, F counts of a prompt, K draft length

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtptrain.evaluation.head_result import Acceptance, Gain, Interval, Totals
from mtptrain.evaluation.student_t import bootstrap_widening
from mtptrain.replay.replay import Counts

RESAMPLES = 2000
DETECTABLE = 1.960 + 0.842  # standard errors: two-sided 5 % level, 80 % power


def acceptance_length(prompts: list[Counts]) -> float | None:
    """Return the tokens emitted per verify pass, the verifier's token included: 1 = no gain, K + 1 = ceiling.

    None without passes: every text ends at its first token.
    """
    return totals(prompts).acceptance_length


class Positions(NamedTuple):
    """Drafted tokens by position; see `Acceptance`. `drafted` is None if unknown for any prompt."""

    drafted: list[float] | None
    reached: list[float]
    accepted: list[float]

    @property
    def conditional(self) -> list[float | None]:
        """Share accepted at k of the drafts that were verified there; None for a position never reached."""
        return [a / r if r else None for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def unconditional(self) -> list[float | None]:
        """Share accepted at k of all drafts that had a position k; None if unknown."""
        if self.drafted is None:
            return [None] * len(self.accepted)
        return [a / d if d else None for a, d in zip(self.accepted, self.drafted, strict=True)]


def by_position(prompts: list[Counts]) -> Positions:
    """Return the drafted, verified and accepted tokens of some prompts at each position."""
    known = [counts.drafted_K for counts in prompts if counts.drafted_K is not None]
    return Positions(
        drafted=_numbers(np.sum(known, axis=0)) if len(known) == len(prompts) else None,
        reached=_numbers(np.sum([counts.reached_K for counts in prompts], axis=0)),
        accepted=_numbers(np.sum([counts.accepted_K for counts in prompts], axis=0)),
    )


def totals(prompts: list[Counts]) -> Totals:
    """Return passes, emitted tokens and acceptance length of some prompts."""
    passes, emitted = passes_and_tokens(prompts)
    return Totals(emitted / passes if passes else None, passes, emitted)


def passes_and_tokens(prompts: list[Counts]) -> tuple[float, float]:
    """Return the passes of some prompts and the tokens that they emitted."""
    passes, emitted = _numbers(np.sum([(counts.passes, counts.emitted) for counts in prompts], axis=0))
    return passes, emitted


def _numbers(values: np.ndarray) -> list[float]:
    """Return plain numbers, whole ones as int, so that counts of a loop are written as whole numbers."""
    return [int(value) if value.is_integer() else value for value in values.tolist()]


def summarize(prompts: list[Counts], groups: list[int], longest: int | None = None) -> Acceptance:
    """Return the acceptance of one head at one draft length, with a 95 % bootstrap interval over groups of prompts.

    Args:
        prompts: counts of each prompt; a prompt without passes (one emitted token) adds nothing, and without any
            passes length and interval are None.
        groups: the group of each prompt.
        longest: K; None if the counts are by position.
    """
    passes, emitted = passes_and_tokens(prompts)
    possible = lengths_of(prompts) if longest is None else (1.0, 1.0 + longest)
    positions = by_position(prompts)
    return Acceptance(
        acceptance_length=emitted / passes if passes else None,
        passes=passes,
        emitted=emitted,
        interval=_length_interval(prompts, groups, emitted / passes, possible) if passes else None,
        drafted=[None] * len(positions.reached) if positions.drafted is None else [*positions.drafted],
        reached=positions.reached,
        accepted=positions.accepted,
        conditional=positions.conditional,
        unconditional=positions.unconditional,
    )


def by_domain(prompts: list[Counts], groups: list[int], domains: list[str]) -> dict[str, Acceptance | None]:
    """Return `summarize` for the prompts of each domain, in the order of their first prompts; None without passes."""
    summaries: dict[str, Acceptance | None] = {}
    for domain, rows in domain_rows(domains).items():
        of_domain = [prompts[i] for i in rows]
        summaries[domain] = summarize(of_domain, [groups[i] for i in rows]) if have_passes(of_domain) else None
    return summaries


def have_passes(prompts: list[Counts]) -> bool:
    """Return whether any prompt needed a verify pass: without passes there is no acceptance to measure."""
    return any(counts.passes > 0 for counts in prompts)


def domain_rows(domains: list[str]) -> dict[str, list[int]]:
    """Return the indices of the prompts of each domain, domains in the order of their first prompts."""
    rows: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        rows.setdefault(domain, []).append(number)
    return rows


def paired_gain(base: list[Counts], other: list[Counts], groups: list[int]) -> Gain | None:
    """Return the difference of acceptance length on the same prompts, `other` minus `base`; None without passes."""
    old, new = acceptance_length(base), acceptance_length(other)
    if old is None or new is None:
        return None
    resampled_R = _resampled_lengths(other, groups) - _resampled_lengths(base, groups)
    return difference(new - old, resampled_R, _num_groups(base, groups), most=draft_length(base))


def paired_gain_by_domain(
    base: list[Counts], other: list[Counts], groups: list[int], domains: list[str]
) -> dict[str, Gain | None]:
    """Return `paired_gain` for the prompts of each domain; None for a domain without passes."""
    gains: dict[str, Gain | None] = {}
    for domain, rows in domain_rows(domains).items():
        old, new = ([prompts[i] for i in rows] for prompts in (base, other))
        gains[domain] = paired_gain(old, new, [groups[i] for i in rows])
    return gains


def paired_position_gain(base: list[Counts], other: list[Counts], groups: list[int]) -> list[Gain | None]:
    """Return the difference of conditional acceptance at each position; None if a resample never reached it."""
    (old_K, old_RK), (new_K, new_RK) = (_conditional(prompts, groups) for prompts in (base, other))
    known_K, num_groups = np.isfinite(new_RK - old_RK).all(0), _num_groups(base, groups)
    return [
        difference(float(new_K[k] - old_K[k]), new_RK[:, k] - old_RK[:, k], num_groups, most=1.0)
        if known_K[k]
        else None
        for k in range(len(known_K))
    ]


def draft_length(prompts: list[Counts]) -> int:
    """Return K, the most that a gain in acceptance length can be."""
    return len(prompts[0].accepted_K)


def lengths_of(prompts: list[Counts]) -> Interval:
    """Return the least and the largest possible acceptance length."""
    return 1.0, 1.0 + draft_length(prompts)


def _length_interval(prompts: list[Counts], groups: list[int], length: float, possible: Interval) -> Interval:
    return widened(length, _resampled_lengths(prompts, groups), _num_groups(prompts, groups), possible)


def _num_groups(prompts: list[Counts], groups: list[int]) -> int:
    """Return the number of groups with a verify pass."""
    return len({group for counts, group in zip(prompts, groups, strict=True) if counts.passes > 0})


def _resampled_lengths(prompts: list[Counts], groups: list[int]) -> np.ndarray:
    """Return the acceptance length of every bootstrap sample, [R]; prompts without passes are left out."""
    kept = [(counts, group) for counts, group in zip(prompts, groups, strict=True) if counts.passes > 0]
    counts_PF = np.array([(counts.passes, counts.emitted) for counts, _ in kept], dtype=np.float64)
    passes_R, emitted_R = resampled_totals(counts_PF, [group for _, group in kept]).T
    return emitted_R / passes_R


def _conditional(prompts: list[Counts], groups: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the conditional acceptance by position: the value [K] and its resamples [R, K]."""
    counts_PF = np.array([np.concatenate([counts.accepted_K, counts.reached_K]) for counts in prompts])
    with np.errstate(invalid="ignore"):
        accepted_K, reached_K = np.split(counts_PF.sum(0), 2)
        accepted_RK, reached_RK = np.split(resampled_totals(counts_PF, groups), 2, axis=1)
        return accepted_K / reached_K, accepted_RK / reached_RK


def resampled_totals(counts_PF: np.ndarray, groups: list[int]) -> np.ndarray:
    """Return the totals of bootstrap samples of groups, float64 [R, F]; all prompts of a group are drawn together.

    The draws depend on the number of groups alone, so totals of two heads on the same prompts are paired.

    Args:
        counts_PF: counts of every prompt.
        groups: the group of every prompt; groups are independent of each other.
    """
    numbers, group_P = np.unique(groups, return_inverse=True)
    counts_GF = np.zeros((len(numbers), counts_PF.shape[1]))
    np.add.at(counts_GF, group_P, counts_PF)
    size = len(numbers)
    times_RG = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return times_RG @ counts_GF


def interval(values_R: np.ndarray) -> Interval:
    """Return the 95 % percentile interval."""
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def widened(value: float, resampled_R: np.ndarray, num_groups: int, possible: Interval) -> Interval:
    """Return the 95 % interval of a value: percentiles, moved away from it as far as so few groups require.

    Args:
        value: of the sample itself.
        resampled_R: of its bootstrap samples.
        num_groups: groups that were resampled. One says nothing about others: its interval is everything possible.
        possible: the least and the largest possible value.
    """
    if num_groups < 2:
        return possible
    low, high = interval(resampled_R)
    factor = bootstrap_widening(num_groups)
    return clip((value + factor * (low - value), value + factor * (high - value)), possible)


def clip(interval: Interval, possible: Interval) -> Interval:
    """Return the part of an interval that is possible."""
    return max(interval[0], possible[0]), min(interval[1], possible[1])


def difference(value: float, resampled_R: np.ndarray, num_groups: int, most: float) -> Gain:
    """Return a paired difference from its value and its resamples.

    Args:
        value: the difference.
        resampled_R: of the bootstrap samples.
        num_groups: groups that were resampled.
        most: the largest possible difference.
    """
    detectable = most
    if num_groups > 1:
        detectable = min(bootstrap_widening(num_groups) * DETECTABLE * float(resampled_R.std()), most)
    return Gain(value, widened(value, resampled_R, num_groups, (-most, most)), detectable)
