"""Acceptance figures: pure functions on records of verify passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtptrain.decoding.records import VerifyPass

RESAMPLES = 2000


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
    """Difference of acceptance length, `other` minus `base`, over the same prompts, with a 95 % interval."""
    both = [(a, b) for a, b in zip(base, other, strict=True) if a and b]
    old, new = [a for a, _ in both], [b for _, b in both]
    rows = _resamples(len(both))
    difference = _resampled_lengths(new, rows) - _resampled_lengths(old, rows)
    return {"gain": acceptance_length(new) - acceptance_length(old), "interval": _interval(difference)}
