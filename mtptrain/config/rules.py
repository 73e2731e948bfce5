"""Ranges of settings, and the error for a value outside its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, get_type_hints

from mtptrain.errors import UserError

MAX_DRAFT_LENGTH = 8
HELDOUT = "heldout"  # of `prompts`: slices of the held-out documents
TRAINING = "training"  # of `on_policy.prompts`: slices of the training documents
ALL_CHECKPOINTS = "all"  # of `checkpoints`: every checkpoint of a run


@cache
def types_of(schema: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name."""
    return get_type_hints(schema)


def require(condition: bool, setting: str, value: Any, rule: str) -> None:
    """Raise a `UserError` with setting, value and rule unless the condition holds."""
    if not condition:
        raise UserError(f"{setting}={as_written(value)}: {rule}")


def as_written(value: Any, text: Callable[[str], str] = str) -> str:
    """Return a value as the command line writes it: None is null, a list is [A,B], a mapping is {K:V}.

    Args:
        value: of a setting.
        text: writes a text that is none of these.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= 1e7:
        return format(Decimal(repr(value)).normalize(), "e")  # 9.894e+14, no row of zeros
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{as_written(key, text)}:{as_written(one, text)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_written(one, text) for one in value) + "]"
    return text(str(value))  # also of a path


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A lower bound and perhaps an upper one, as in `0 <= x < 1`; infinity is allowed only by `at_most=math.inf`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (math.isfinite(value) or value == self.at_most)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        has_closed_end = self.at_most not in (None, math.inf)
        if has_closed_end and self.at_least is not None:
            return f"must lie between {self.at_least} and {self.at_most}"
        if has_closed_end or self.below is not None:
            low = f"[{self.at_least}" if self.above is None else f"({self.above}"
            return f"must lie in {low}, " + (f"{self.at_most}]" if has_closed_end else f"{self.below})")
        if self.above is not None:
            return f"must be above {self.above}"
        return "must not be negative" if self.at_least == 0 else f"must be at least {self.at_least}"


def ranged(default: Any, *, rule: str | None = None, **bounds: float) -> Any:
    """Declare a number, a list of numbers or None, with the range that `check_fields` enforces.

    Args:
        default: of the field.
        rule: text of the error; None derives it from the bounds.
        bounds: of `Range`.
    """
    allowed = Range(**bounds)
    return _checked(default, allowed, rule or str(allowed))


def one_of(default: Any, *words: str) -> Any:
    """Declare a word or a list of words, with the allowed words that `check_fields` enforces."""
    return _checked(default, words, f"must be {any_of(words)}")


def any_of(words: Sequence[str]) -> str:
    """Return words as a choice: `a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def did_you_mean(word: str, words: Collection[str]) -> str:
    """Return `; did you mean X?` for the nearest of the existing words, or nothing if none is near."""
    near = get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _checked(default: Any, allowed: Container[Any], rule: str) -> Any:
    metadata = {"allowed": allowed, "rule": rule}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(section: Any, name: str) -> None:
    """Check every value, and every item of a list, against the range of its field; None passes.

    Args:
        section: a dataclass with fields made by `ranged` and `one_of`; other fields are not checked.
        name: dotted name of the section, empty for the settings of the run itself.

    Raises:
        UserError: names the first setting outside its range, its value and the rule.
    """
    for part in fields(section):
        value, allowed = getattr(section, part.name), part.metadata.get("allowed")
        if allowed is None or value is None:
            continue
        items = value if isinstance(value, list) else [value]
        rule = "must be finite" if value == math.inf else part.metadata["rule"]
        wrong = [item for item in items if item not in allowed]
        if wrong and isinstance(allowed, tuple):
            rule += did_you_mean(str(wrong[0]), allowed)
        require(not wrong, f"{name}.{part.name}".removeprefix("."), value, rule)


def checkpoint_groups(given: Any) -> list[list[str]]:
    """Return the heads that `checkpoints` lists: a path stands alone, and a list in the list is one setting's seeds.

    Raises:
        UserError: the value is neither `all` nor such a list.
    """
    if given == ALL_CHECKPOINTS:
        return []
    groups = [[one] if isinstance(one, str) else one for one in given] if isinstance(given, list) else None
    is_sound = groups is not None and all(
        isinstance(group, list) and group and all(isinstance(one, str) and one for one in group) for group in groups
    )
    rule = "must be `all`, or a list such as checkpoints=[A,B]; the seeds of one setting are a list in it: [[A0,A1],B]"
    require(is_sound, "checkpoints", given, rule)
    return groups or []


def prompt_names(setting: str, given: Any, default: str) -> list[str]:
    """Return the names that a setting of prompts lists; `default` cannot be combined with other prompts."""
    names = [given] if isinstance(given, str) else given
    is_list = isinstance(names, list) and bool(names) and all(isinstance(one, str) and one for one in names)
    require(is_list, setting, given, f"must be {default}, or a file, folder or data set, or a list of them")
    is_alone = names == [default] or default not in names
    require(is_alone, setting, names, f"{default} cannot be combined with others; give it its own run")
    return names
