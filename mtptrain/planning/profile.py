"""The acceptance that a plan counts on: given, or read from an evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtptrain.config import PlanConfig
from mtptrain.errors import UserError


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
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        heads = {head["name"]: head for head in evaluation["heads"]}
        chosen = name or list(heads)[-1]
        if chosen not in heads:
            raise UserError(f"plan.head={name}: {file} holds the heads {sorted(heads)}; choose one of them")
        return Profile(_conditional(heads[chosen]), f"head {chosen} of {file}")
    except OSError as error:
        raise UserError(
            f"plan.evaluation={path}: cannot be read ({error.strerror}); give an evaluation.json or its run's folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"plan.evaluation={path}: is no evaluation.json ({error}); give one that `+recipe=evaluate` wrote"
        ) from None


def _conditional(head: dict[str, Any]) -> list[float]:
    """Rates of the longest draft; a position that was never reached counts as never kept."""
    longest = max(head["replay"], key=int)
    return [rate or 0.0 for rate in head["replay"][longest]["conditional"]]
