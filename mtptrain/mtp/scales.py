"""UE8M0 scales: one byte b for a block of a weight, meaning 2^(b - 127)."""

# R rows, C columns

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from mtptrain.errors import UserError

# Rows are worked on in pieces of about this many values; of 2^16 to 2^18 the fastest on one core of a Xeon, 2026-11.
CHUNK = 1 << 18
FP8_BLOCK = (128, 128)
FP4_BLOCK = (1, 32)
BIAS = 127
NEUTRAL = 127  # the byte of an all-zero block: 2^0
NAN_SCALE = 255


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight [R, C]; blocks at the edges may be partial."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def powers(scale: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """2^(b - 127) of every scale byte, fp32; exact, 2^-127 being subnormal."""
    if scale.dtype not in (torch.float8_e8m0fnu, torch.uint8):
        raise UserError(f"{name}: its scale must be float8_e8m0fnu or uint8, is {scale.dtype}")
    if tuple(scale.shape) != shape:
        raise UserError(f"{name}: its scale must have the shape {list(shape)}, has {list(scale.shape)}")
    exponents = scale.contiguous().view(torch.uint8).int()
    if exponents.numel() and int(exponents.amax()) == NAN_SCALE:
        raise UserError(f"{name}: a scale is NaN (byte 255); the file is damaged")
    return power_of(exponents)


def power_of(exponents: Tensor) -> Tensor:
    """2^(b - 127), fp32, for int32 b in 0..254."""
    return _power_table(exponents.device).index_select(0, exponents.reshape(-1)).view(exponents.shape)


@cache
def _power_table(device: torch.device) -> Tensor:
    return torch.ldexp(torch.ones(NAN_SCALE, dtype=torch.float64), torch.arange(NAN_SCALE) - BIAS).float().to(device)


def pieces(num_rows: int, num_columns: int, block_rows: int) -> list[slice]:
    """Consecutive rows that are worked on together: one row of blocks, or about `CHUNK` values of single rows."""
    step = block_rows if block_rows > 1 else max(1, CHUNK // max(1, num_columns))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def scale_rows(rows: slice, block_rows: int) -> slice:
    """The rows of scales that belong to some rows of the weight."""
    return slice(rows.start // block_rows, math.ceil(rows.stop / block_rows))


def block_amax(magnitude: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest of every block of a piece, [1 row of blocks or R, groups]; the last group may be narrower."""
    if block[0] > 1:
        magnitude = magnitude.amax(0, keepdim=True)
    whole = magnitude.shape[1] // block[1] * block[1]
    parts = [magnitude[:, :whole].unflatten(1, (whole // block[1], block[1])).amax(-1)] if whole else []
    parts += [magnitude[:, whole:].amax(-1, keepdim=True)] if whole < magnitude.shape[1] else []
    return torch.cat(parts, dim=1)


def scale_columns(values: Tensor, power: Tensor, width: int) -> None:
    """Multiply every `width` columns in place by their own power; [rows, C] by [rows or 1, groups]."""
    whole = values.shape[1] // width
    values[:, : whole * width].unflatten(1, (whole, width)).mul_(power[:, :whole, None])
    if whole < power.shape[1]:
        values[:, whole * width :].mul_(power[:, whole:])


def smallest_scale(amax: Tensor, largest: float) -> Tensor:
    """Byte b (int32) of the smallest 2^(b - 127) with amax <= largest * 2^(b - 127); `NEUTRAL` where amax is 0."""
    mantissa, exponent = math.frexp(largest)  # largest = 2 mantissa * 2^(exponent - 1)
    # Adding this to fp32 bits carries into the exponent exactly where the mantissa is above that of `largest`.
    carry = (1 << 23) - 1 - int((2 * mantissa - 1) * (1 << 23))
    bits = amax.view(torch.int32)
    byte = ((bits + carry) >> 23).sub_(exponent - 1).clamp_(0, NAN_SCALE - 1)
    return byte.masked_fill_(bits == 0, NEUTRAL)
