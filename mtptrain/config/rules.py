"""How a setting is refused."""

from __future__ import annotations

import math
from typing import Any

from mtptrain.errors import UserError

MAX_DRAFT_LENGTH = 8
HELDOUT = "heldout"  # of `prompts`: slices of the held-out documents
TRAINING = "training"  # of `on_policy.prompts`: slices of the training documents


def require(condition: bool, setting: str, value: Any, rule: str) -> None:
    """Raise a `UserError` that names setting, value and rule unless the condition holds."""
    if not condition:
        raise UserError(f"{setting}={value}: {rule}")


def check_policy(section: str, temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse what no token can be drawn with; `section` is where the settings stand."""
    is_heat = math.isfinite(temperature) and temperature >= 0
    require(is_heat, f"{section}.temperature", temperature, "must be 0 (greedy) or above")
    require(top_k is None or top_k >= 1, f"{section}.top_k", top_k, "must be at least 1, or null to keep all tokens")
    require(0 < top_p <= 1, f"{section}.top_p", top_p, "must lie in (0, 1]; 1 keeps all tokens")


def prompt_names(setting: str, given: Any, default: str) -> list[str]:
    """The list of names that a setting of prompts means; `default` stands alone."""
    names = [given] if isinstance(given, str) else given
    is_list = isinstance(names, list) and bool(names) and all(isinstance(one, str) and one for one in names)
    require(is_list, setting, given, f"must be {default}, or a file, folder or data set, or a list of them")
    require(names == [default] or default not in names, setting, names, f"{default} stands alone; give it its own run")
    return names
