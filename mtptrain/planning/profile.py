"""The acceptance that a plan counts on: given, or read from an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtptrain.config import PlanConfig
from mtptrain.errors import UserError
from mtptrain.evaluation.result import read_evaluation


@dataclass(frozen=True, slots=True)
class Profile:
    """Conditional acceptance by position.

    Attributes:
        conditional: share of drafts kept at position k, given that all earlier ones were kept; later positions
            repeat the last.
        source: origin of the shares, for people to read.
    """

    conditional: list[float]
    source: str


def read_profile(plan: PlanConfig) -> Profile:
    """Return the acceptance that the settings give or that an evaluation measured.

    Raises:
        UserError: the settings give neither, or the evaluation cannot be read or has no such head.
    """
    if plan.evaluation is not None:
        return _from_evaluation(Path(plan.evaluation), plan.head)
    if not plan.acceptance:
        raise UserError(
            "plan.acceptance=[]: must hold at least one share; give plan.acceptance=[0.8,0.6] or plan.evaluation=RUN"
        )
    return Profile(plan.acceptance, "assumed")


def _from_evaluation(path: Path, name: str | None) -> Profile:
    """Rates of the longest draft; a position that was never reached counts as never kept."""
    evaluation = read_evaluation(path, "plan.evaluation")
    heads = {head.name: head for head in evaluation.heads}
    chosen = name or evaluation.last_head.name
    if chosen not in heads:
        raise UserError(f"plan.head={name}: {path} holds the heads {sorted(heads)}; choose one of them")
    rates = heads[chosen].replay[evaluation.draft_length].conditional
    return Profile([rate or 0.0 for rate in rates], f"head {chosen} of {path}")
