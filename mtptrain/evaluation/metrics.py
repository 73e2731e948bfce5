"""Acceptance figures: pure functions on records of verify passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtptrain.decoding.records import VerifyPass

RESAMPLES = 2000
DETECTABLE = 1.960 + 0.842  # standard errors: two-sided 5 % level, 80 % power


def totals(passes: list[VerifyPass]) -> tuple[int, int]:
    """Passes and tokens they emitted."""
    return len(passes), sum(record.emitted for record in passes)


def acceptance_length(prompts: list[list[VerifyPass]]) -> float:
    """Tokens emitted a verify pass, the verifier's own token included: 1 = no gain, K + 1 = ceiling."""
    passes, emitted = np.array([totals(passes) for passes in prompts]).sum(0)
    return float(emitted / passes)


def _resampled_lengths(prompts: list[list[VerifyPass]], rows: np.ndarray) -> np.ndarray:
    counts = np.array([totals(passes) for passes in prompts], dtype=np.float64)
    passes, emitted = counts[rows].sum(1).T
    return emitted / passes


def _resamples(num_prompts: int) -> np.ndarray:
    """Prompt numbers of the bootstrap samples, the same for every head so that differences are paired."""
    return np.random.default_rng(0).integers(0, num_prompts, (RESAMPLES, num_prompts))


def _interval(values: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.quantile(values, [0.025, 0.975])]


def _difference(value: float, resampled: np.ndarray) -> dict[str, Any]:
    """A paired difference: value, 95 % interval, and the smallest true one these prompts would have shown."""
    return {"gain": value, "interval": _interval(resampled), "detectable": float(DETECTABLE * resampled.std())}


def by_position(prompts: list[list[VerifyPass]], draft_length: int) -> dict[str, list[Any]]:
    """Drafted and accepted tokens at each position, and the two acceptance rates.

    `conditional`: accepted at k of those whose position k - 1 was accepted; None where that never happened.
    `unconditional`: accepted at k of all drafts that had a position k.
    """
    records = [record for passes in prompts for record in passes]
    drafted = [sum(record.drafted >= k for record in records) for k in range(1, draft_length + 1)]
    accepted = [sum(record.accepted >= k for record in records) for k in range(1, draft_length + 1)]
    reached = [
        sum(record.drafted >= k and record.accepted >= k - 1 for record in records) for k in range(1, draft_length + 1)
    ]
    return {
        "drafted": drafted,
        "accepted": accepted,
        "conditional": [a / r if r else None for a, r in zip(accepted, reached, strict=True)],
        "unconditional": [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)],
    }


def summarize(prompts: list[list[VerifyPass]], draft_length: int) -> dict[str, Any]:
    """Acceptance of one head at one draft length, with a 95 % bootstrap interval over prompts.

    Args:
        prompts: passes of each prompt; a prompt without passes (one emitted token) tells nothing and is left out.
        draft_length: K.
    """
    told = [passes for passes in prompts if passes]
    passes, emitted = (int(value) for value in np.array([totals(passes) for passes in told]).sum(0))
    return {
        "acceptance_length": emitted / passes,
        "interval": _interval(_resampled_lengths(told, _resamples(len(told)))),
        "passes": passes,
        "emitted": emitted,
        **by_position(told, draft_length),
    }


def paired_gain(base: list[list[VerifyPass]], other: list[list[VerifyPass]]) -> dict[str, Any]:
    """Difference of acceptance length, `other` minus `base`, over the same prompts.

    Returns:
        `gain`, its 95 % bootstrap `interval` over prompts, and `detectable`: the smallest true difference that these
        prompts would have shown with 80 % power.
    """
    both = [(a, b) for a, b in zip(base, other, strict=True) if a and b]
    old, new = [a for a, _ in both], [b for _, b in both]
    rows = _resamples(len(both))
    difference = _resampled_lengths(new, rows) - _resampled_lengths(old, rows)
    return _difference(acceptance_length(new) - acceptance_length(old), difference)


def _position_counts(prompts: list[list[VerifyPass]], draft_length: int) -> np.ndarray:
    """Accepted and reached drafts of every prompt and position, float64 [2, prompts, K]."""
    accepted = [[sum(r.accepted >= k for r in passes) for k in range(1, draft_length + 1)] for passes in prompts]
    reached = [
        [sum(r.drafted >= k and r.accepted >= k - 1 for r in passes) for k in range(1, draft_length + 1)]
        for passes in prompts
    ]
    return np.array([accepted, reached], dtype=np.float64)


def paired_position_gain(
    base: list[list[VerifyPass]], other: list[list[VerifyPass]], draft_length: int
) -> list[dict[str, Any] | None]:
    """Difference of conditional acceptance at each position, as `paired_gain`; None where one was never reached."""
    rows = _resamples(len(base))

    def rates(prompts: list[list[VerifyPass]]) -> tuple[np.ndarray, np.ndarray]:
        accepted, reached = _position_counts(prompts, draft_length)
        with np.errstate(invalid="ignore"):
            return accepted.sum(0) / reached.sum(0), accepted[rows].sum(1) / reached[rows].sum(1)

    (old, old_resampled), (new, new_resampled) = rates(base), rates(other)
    differences = new_resampled - old_resampled
    return [
        _difference(float(new[k] - old[k]), differences[:, k]) if np.isfinite(differences[:, k]).all() else None
        for k in range(draft_length)
    ]
