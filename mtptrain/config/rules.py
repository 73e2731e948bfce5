"""How a setting is refused."""

from __future__ import annotations

from typing import Any

from mtptrain.errors import UserError

MAX_DRAFT_LENGTH = 8
HELDOUT = "heldout"  # of `prompts`: slices of the held-out documents


def require(condition: bool, setting: str, value: Any, rule: str) -> None:
    """Raise a `UserError` that names setting, value and rule unless the condition holds."""
    if not condition:
        raise UserError(f"{setting}={value}: {rule}")
