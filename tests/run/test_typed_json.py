import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from mtptrain.run.typed_json import MismatchError, from_json, to_json


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawing:
    points: list[Point]
    by_length: dict[int, Point | None]
    colour: Colour
    interval: tuple[float, float]
    note: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


DRAWING = Drawing([Point(1.5, ("a",))], {4: Point(2), 12: None}, Colour.blue, (0.0, 1.0))


def test_a_dataclass_survives_json() -> None:
    assert from_json(Drawing, json.loads(json.dumps(to_json(DRAWING)))) == DRAWING


def test_keys_and_enums_become_strings() -> None:
    assert to_json(DRAWING)["by_length"] == {"4": {"x": 2, "names": []}, "12": None}
    assert to_json(DRAWING)["colour"] == "blue"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "green"}, "colour: 'green' is not one of"),
        ({"points": [{"x": "1"}]}, r"points\[0\]\.x: expected float"),
        ({"points": [{}]}, r"points\[0\]\.x: missing"),
        ({"by_length": {"four": None}}, "by_length: expected an object with whole numbers"),
        ({"interval": [1.0]}, "interval: expected a list of 2"),
        ({"shade": 1}, "shade: unknown field of Drawing"),
        ({"note": 3}, "note: expected str"),
        ({"interval": [float("nan"), 1.0]}, r"interval\[0\]: expected float"),
        ({"points": [{"x": True}]}, r"points\[0\]\.x: expected float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mismatch_names_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        from_json(Drawing, to_json(DRAWING) | change)


def test_a_value_without_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json({"a": object()})
