"""Dataclasses as JSON and back, so that files are typed when written and when read.

A field that is missing, unknown or of the wrong type is an error that names its path, such as `heads[0].replay.4`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from mtptrain.config.rules import types_of

T = TypeVar("T")
JsonObject = dict[str, Any]  # plain values of any type of JSON, by name


class MismatchError(ValueError):
    """A JSON value does not have the expected type; the message starts with its path."""


def to_json(value: Any) -> Any:
    """Convert dataclasses, enums, tuples and mappings to plain dicts, lists and strings.

    Keys become strings. Fields keep the order of their declaration.

    Raises:
        TypeError: a value has no JSON form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_json(kind: type[T], value: Any) -> T:
    """Return the value of type `kind` that has this JSON form.

    Args:
        kind: a dataclass, or any type built from dataclasses, enums, `list`, `tuple`, `dict`, `|` and plain values.
        value: as `json.loads` returns it. An int is accepted for a float.

    Raises:
        MismatchError: a field is missing or unknown, or a value has another type.
    """
    decoded: T = _decode(kind, value, "")
    return decoded


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin is Literal:
        _check(value in arguments, arguments, value, path)
        return value
    if origin is list:
        _check(isinstance(value, list), "a list", value, path)
        return [_decode(arguments[0], one, f"{path}[{number}]") for number, one in enumerate(value)]
    if origin is tuple:
        return _decode_tuple(arguments, value, path)
    if origin is dict:
        _check(isinstance(value, dict), "an object", value, path)
        return {
            _decode_key(arguments[0], key, path): _decode(arguments[1], one, _join(path, key))
            for key, one in value.items()
        }
    if is_dataclass(kind):
        return _decode_fields(kind, value, path)
    return _decode_plain(kind, value, path)


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _decode(kind, value, path)
            except MismatchError as error:
                errors.append(error)
    raise errors[0]


def _decode_tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    _check(isinstance(value, list), "a list", value, path)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _check(len(value) == len(kinds), f"a list of {len(kinds)}", value, path)
    return tuple(_decode(kind, one, f"{path}[{i}]") for i, (kind, one) in enumerate(zip(kinds, value, strict=True)))


def _decode_key(kind: Any, key: str, path: str) -> Any:
    if kind is int:
        _check(key.removeprefix("-").isdecimal(), "an object with whole numbers as keys", key, path)
        return int(key)
    return _decode(kind, key, path)


def _decode_fields(kind: Any, value: Any, path: str) -> Any:
    _check(isinstance(value, dict), f"an object ({kind.__name__})", value, path)
    hints, known = types_of(kind), {field.name: field for field in fields(kind)}
    unknown = [name for name in value if name not in known]
    if unknown:
        raise MismatchError(f"{_join(path, unknown[0])}: unknown field of {kind.__name__}")
    decoded = {}
    for name, field in known.items():
        if name in value:
            decoded[name] = _decode(hints[name], value[name], _join(path, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise MismatchError(f"{_join(path, name)}: missing field of {kind.__name__}")
    return kind(**decoded)


def _decode_plain(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise MismatchError(f"{path}: {value!r} is not one of {[one.value for one in kind]}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    is_right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    _check(is_right and not (kind is float and not math.isfinite(value)), kind.__name__, value, path)
    return value


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _check(condition: bool, wanted: object, value: Any, path: str) -> None:
    if not condition:
        text = repr(value)
        shown = text if len(text) < 60 else f"{text[:57]}..."
        raise MismatchError(f"{path or 'value'}: expected {wanted}, got {shown}")
