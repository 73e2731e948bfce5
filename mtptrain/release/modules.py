"""Read and write MTP modules in the format of DeepSeek-V4's releases."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.errors import UserError
from mtptrain.release.codec import (
    FP4_BLOCK,
    FP8_BLOCK,
    SCALE_DTYPES,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    store_scales,
)
from mtptrain.release.encoding_error import EncodingError, encoding_error, rounding_error
from mtptrain.release.names import Row, Scheme, our_shapes, release_table
from mtptrain.release.problems import Problems, is_dspark, mismatch, refuse_dspark
from mtptrain.release.shards import HEAD_PREFIX


def module_numbers(names: Collection[str]) -> list[int]:
    """Return the d of all `mtp.{d}.*` names, sorted."""
    numbers = {name.split(".")[1] for name in names if name.startswith(HEAD_PREFIX)}
    return sorted(int(number) for number in numbers if number.isdecimal())


def is_release_layout(names: Collection[str]) -> bool:
    """Return whether `mtp.*` names follow a release; most of our names are `mtp.{d}.layer.*`."""
    return not any(".layer." in name for name in names)


def release_scheme(tensors: Mapping[str, Tensor]) -> Scheme:
    """Return the scheme of stored modules, from their names and the dtype of one expert."""
    if not any(name.endswith(".scale") for name in tensors):
        return "bf16"
    name = "mtp.0.ffn.experts.0.w1.weight"
    return "fp8" if name in tensors and tensors[name].dtype == torch.float8_e4m3fn else "fp8_fp4"


def from_release(
    tensors: Mapping[str, Tensor], config: DeepseekV4Config, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return our state dict `mtp.{d}.*` of released modules in any scheme.

    Args:
        tensors: the `mtp.*` of a release and nothing else. Each is read once (one expert twice), so a mapping that
            reads files on demand never holds more than a tensor and its scale.
        config: config of the backbone.
        dtype: torch.bfloat16 or torch.float32, of the weights; tensors that a release keeps in fp32 stay fp32.

    Raises:
        UserError: the tensors are DSpark blocks, or one is missing, unexpected, mis-shaped or cannot be decoded.
    """
    check_names(tensors, config)
    scheme, problems = release_scheme(tensors), Problems()
    state = _decode(tensors, release_table(config, scheme), config, dtype, problems)
    problems.raise_any(_subject(scheme))
    return state


class ReleasedModules:
    """Our tensors `mtp.{d}.*` of released modules in any scheme, decoded to fp32 when they are needed.

    Args:
        tensors: the `mtp.*` of a release and nothing else, read on demand.
        config: config of the backbone.

    Raises:
        UserError: the tensors are DSpark blocks, or one is missing or unexpected.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: DeepseekV4Config) -> None:
        check_names(tensors, config)
        self.tensors, self.scheme = tensors, release_scheme(tensors)
        self._rows: dict[tuple[str, int | None], list[Row]] = {}
        for row in release_table(config, self.scheme):
            if not row.is_scale:
                self._rows.setdefault((row.ours, row.expert), []).append(row)
        modules = _modules(tensors.keys())
        self.shapes = {f"mtp.{d}.{name}": shape for d in modules for name, shape in our_shapes(config).items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that holds no experts.

        Raises:
            UserError: it is mis-shaped or cannot be decoded.
        """
        _, number, ours = name.split(".", 2)
        (row,) = self._rows[ours, None]
        return self._decoded(row, f"mtp.{number}.")

    def expert(self, name: str, number: int) -> Tensor:
        """Return one expert of a stack of experts.

        Raises:
            UserError: one of its parts is mis-shaped or cannot be decoded.
        """
        _, module, ours = name.split(".", 2)
        out = torch.empty(self.shapes[name][1:])
        for row in self._rows[ours, number]:
            part_of_expert(row, out).copy_(self._decoded(row, f"mtp.{module}."))
        return out

    def _decoded(self, row: Row, prefix: str) -> Tensor:
        problems = Problems()
        value = _read(row, prefix, self.tensors, torch.float32, problems)
        problems.raise_any(_subject(self.scheme))
        assert value is not None
        return value


def check_names(tensors: Mapping[str, Tensor], config: DeepseekV4Config) -> None:
    """Refuse released modules that are DSpark blocks, or of which a tensor is missing or unexpected.

    Raises:
        UserError: lists the names.
    """
    refuse_dspark(tensors.keys(), config)
    scheme = release_scheme(tensors)
    _name_problems(tensors.keys(), release_table(config, scheme)).raise_any(_subject(scheme))


def _subject(scheme: Scheme) -> str:
    return f"the released MTP tensors (scheme {scheme})"


def read_release(
    tensors: Mapping[str, Tensor], config: DeepseekV4Config, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], Problems]:
    """Return the readable tensors of released modules, and the faults that make `from_release` refuse the others."""
    table = release_table(config, release_scheme(tensors))
    problems = _name_problems(tensors.keys(), table)
    problems.is_dspark = is_dspark(tensors.keys(), config)
    return _decode(tensors, table, config, dtype, problems), problems


def _modules(names: Collection[str]) -> range:
    """Return the d that the modules of these names should have."""
    return range(max(1, len(module_numbers(names))))


def _name_problems(names: Collection[str], table: list[Row]) -> Problems:
    expected = [f"mtp.{d}.{row.released}" for d in _modules(names) for row in table]
    return Problems(*_name_differences(expected, names), expected=len(expected))


def _decode(
    tensors: Mapping[str, Tensor],
    table: list[Row],
    config: DeepseekV4Config,
    dtype: torch.dtype,
    problems: Problems,
) -> dict[str, Tensor]:
    """Return our tensors whose parts are all present and sound; add the faults of other parts to `problems`."""
    state: dict[str, Tensor] = {}
    broken, missing = set(), set(problems.missing)
    shapes = our_shapes(config)
    for d in _modules(tensors.keys()):
        for row in table:
            if row.is_scale:
                continue
            prefix = f"mtp.{d}."
            parts = {prefix + row.released, *([] if row.scale == "none" else [prefix + row.scale_name])}
            value = _read(row, prefix, tensors, dtype, problems) if parts.isdisjoint(missing) else None
            if value is None:
                broken.add(prefix + row.ours)
            else:
                _insert(value, row, prefix, shapes, state)
    return {name: tensor for name, tensor in state.items() if name not in broken}


def iterate_release(
    state: Mapping[str, Tensor],
    config: DeepseekV4Config,
    scheme: Scheme,
    errors: dict[str, EncodingError] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the released names and tensors of our modules, one by one.

    Args:
        state: our `mtp.{d}.*`.
        config: config of the backbone.
        scheme: `fp8_fp4`, `fp8` or `bf16`.
        errors: receives the encoding error of every rounded tensor, by released name.
        scale_dtype: dtype of the scales; None takes that of the scheme's releases.

    Raises:
        UserError: a tensor is missing, unexpected or mis-shaped, or the scheme cannot store a value.
    """
    numbers = _modules(state.keys())
    shapes = our_shapes(config)
    expected = {f"mtp.{d}.{name}": shape for d in numbers for name, shape in shapes.items()}
    problems = Problems(*_name_differences(list(expected), state.keys()))
    for name in expected.keys() & state.keys():
        if tuple(state[name].shape) != expected[name]:
            problems.misshaped.append(f"{name} {list(state[name].shape)} instead of {list(expected[name])}")
    problems.raise_any("the MTP tensors")
    table = release_table(config, scheme, scale_dtype)
    for d in numbers:
        for row in table:
            if not row.is_scale:
                yield from store_row(row, f"mtp.{d}.", part_of(row, state[f"mtp.{d}.{row.ours}"]), errors)


def to_release(
    state: Mapping[str, Tensor],
    config: DeepseekV4Config,
    scheme: Scheme,
    errors: dict[str, EncodingError] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return all of `iterate_release` at once."""
    return dict(iterate_release(state, config, scheme, errors, scale_dtype))


def _name_differences(expected: list[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the missing names in order, and the unexpected ones sorted."""
    known, present = set(expected), set(names)
    return [name for name in expected if name not in present], sorted(present - known)


def _insert(value: Tensor, row: Row, prefix: str, shapes: dict[str, tuple[int, ...]], state: dict[str, Tensor]) -> None:
    """Put a decoded tensor into ours: as a whole, or as an expert's part of one."""
    name = prefix + row.ours
    if row.expert is None:
        state[name] = value
        return
    if name not in state:
        state[name] = torch.empty(shapes[row.ours], dtype=value.dtype, device=value.device)
    part_of(row, state[name]).copy_(value)


def part_of(row: Row, whole: Tensor) -> Tensor:
    """Return the part of one of our tensors that a released tensor stores."""
    return whole if row.expert is None else part_of_expert(row, whole[row.expert])


def part_of_expert(row: Row, expert: Tensor) -> Tensor:
    """Return the part of an expert, in one of our stacks, that a released tensor stores."""
    half = {"w1": slice(0, row.value_shape[0]), "w3": slice(row.value_shape[0], None), "w2": slice(None)}
    return expert[half[row.released.split(".")[-2]]]


def _read(
    row: Row, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, problems: Problems
) -> Tensor | None:
    """Return one decoded tensor; if it is faulty, add its fault to `problems` and return None."""
    name, scale_name = prefix + row.released, prefix + row.scale_name
    stored, scale = tensors[name], None if row.scale == "none" else tensors[scale_name]
    wrong = mismatch(name, stored, row.shape, row.dtype)
    if scale is not None:
        wrong += mismatch(scale_name, scale, row.scale_shape, row.scale_dtype, *SCALE_DTYPES)
    if wrong:
        problems.misshaped += wrong
        return None
    if scale is None:
        value = stored.to(torch.float32 if row.dtype == torch.float32 else dtype)
        if bool(value.isfinite().all()):
            return value
        problems.damaged.append(f"{name}: holds NaN or infinity")
        return None
    try:
        return (decode_fp4 if row.scale == "fp4" else decode_fp8)(stored, scale, dtype, name)
    except UserError as error:
        problems.damaged.append(str(error))
        return None


def store_row(
    row: Row, prefix: str, weight: Tensor, errors: dict[str, EncodingError] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield one of our tensors, or an expert's part of it, as stored, then its scales if it has any.

    Args:
        row: its row of the table.
        prefix: put before the released names.
        weight: floating point or integer, of the row's `value_shape`.
        errors: receives the encoding error by released name; None skips it.

    Raises:
        UserError: the scheme cannot store a value.
    """
    name = prefix + row.released
    if row.scale == "none":
        stored = weight.to(row.dtype, copy=True, memory_format=torch.contiguous_format)
        if not bool(stored.isfinite().all()):
            raise UserError(f"{name}: a value is NaN, infinite or too large for {row.dtype} and cannot be stored")
        if errors is not None and row.dtype == torch.bfloat16:
            errors[name] = rounding_error(weight, stored)
        yield name, stored
        return
    encode, decode, block = (
        (encode_fp4, decode_fp4, FP4_BLOCK) if row.scale == "fp4" else (encode_fp8, decode_fp8, FP8_BLOCK)
    )
    codes, scale = encode(weight, None, name)
    if errors is not None:
        errors[name] = encoding_error(weight, decode(codes, scale, torch.float32, name), scale, block)
    yield name, codes
    yield prefix + row.scale_name, store_scales(scale, row.scale_dtype)
