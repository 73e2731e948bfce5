"""The two weight formats of DeepSeek-V4's releases: FP8 in blocks of 128 x 128, FP4 in groups of 32 columns.

A stored code stands for code * 2^(b - 127), where b is the byte of the UE8M0 scale of its block. FP8 codes are e4m3;
FP4 codes are e2m1, two to an int8 byte, with the even column in the low nibble. Products are formed in fp32, where each
is exact or overflows; a value that the output dtype cannot hold is refused, never rounded.

Files hold the scale of a block as E8M0, as its byte, or as the float32 2^(b - 127), as the -Base releases do.

With the released scales, decoding and encoding again gives the same bytes. Without them, encoding chooses the smallest
power of two that fits. This keeps every value of a release but may store it under another code: the released scale may
be larger than needed, on purpose or because it was chosen before the largest value of the block was rounded down.
"""

# R rows, C columns, P packed columns (two to a byte)

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mtptrain.errors import UserError

FP8_BLOCK, FP4_BLOCK = (128, 128), (1, 32)  # rows and columns that share a scale
FP8_MAX, FP4_MAX = 448.0, 6.0
FP8_TOP = 464.0  # the largest value that rounds to FP8_MAX
FP4_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # value of the low three bits; the fourth is the sign
OVERFLOW = 16  # entry of the FP4 table for a value beyond the grid, infinity or NaN
BIAS = 127  # of a scale byte's exponent
NEUTRAL = 127  # scale byte of an all-zero block: 2^0
NAN_SCALE = 255
SCALE_DTYPES = (torch.float8_e8m0fnu, torch.uint8, torch.float32)  # in which files hold scales
SUBNORMAL = 1 << 22  # bits of the float32 2^-127, the one power with b = 0
CHUNK = 1 << 18  # values of a piece of rows; of 2^16 to 2^18 the fastest on one core of a Xeon, 2026-11


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, name: str = "weight") -> Tensor:
    """Return the weight [R, C] of FP8 codes.

    Args:
        codes: float8_e4m3fn [R, C].
        scale: of `SCALE_DTYPES` [ceil(R / 128), ceil(C / 128)].
        dtype: torch.bfloat16 or torch.float32.
        name: name of the tensor, for errors.

    Raises:
        UserError: wrong dtype or shape, a NaN code or scale, or a value that `dtype` cannot hold.
    """
    _check_codes(codes, torch.float8_e4m3fn, name)
    power = powers(scale, scale_shape((codes.shape[0], codes.shape[1]), FP8_BLOCK), name)
    bytes_RC = codes.contiguous().view(torch.uint8)
    if bytes_RC.numel() and int((bytes_RC & 0x7F).amax()) == 0x7F:
        raise UserError(f"{name}: holds a NaN code of float8_e4m3fn (byte 0x7f or 0xff); the file is damaged")
    return _decode(bytes_RC, power, FP8_BLOCK, dtype, name)


def decode_fp4(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, name: str = "weight") -> Tensor:
    """Return the weight [R, 2 P] of packed FP4 codes.

    Args:
        codes: int8 [R, P].
        scale: of `SCALE_DTYPES` [R, ceil(2 P / 32)].
        dtype: torch.bfloat16 or torch.float32.
        name: name of the tensor, for errors.

    Raises:
        UserError: wrong dtype or shape, a NaN scale, or a value that `dtype` cannot hold.
    """
    _check_codes(codes, torch.int8, name)
    power = powers(scale, scale_shape((codes.shape[0], 2 * codes.shape[1]), FP4_BLOCK), name)
    return _decode(codes.contiguous().view(torch.uint8), power, FP4_BLOCK, dtype, name)


def encode_fp8(weight: Tensor, scale: Tensor | None = None, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return FP8 codes [R, C] and their scales, with each value rounded half to even.

    Args:
        weight: floating point [R, C].
        scale: scales to use; None takes the smallest power of two under which each block fits.
        name: name of the tensor, for errors.

    Returns:
        float8_e4m3fn [R, C] and float8_e8m0fnu [ceil(R / 128), ceil(C / 128)].

    Raises:
        UserError: a value is NaN or infinite, or too large for a given scale.
    """

    def store(scaled: Tensor, spare: Tensor, out: Tensor) -> bool:
        out.copy_(scaled)
        # Checked before the cast: beyond the grid, some machines give NaN and others the largest code.
        return float(torch.abs(scaled, out=spare).amax()) <= FP8_TOP  # false for NaN

    _check_weight(weight, name)
    codes_RC = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    return codes_RC, _encode(weight, scale, codes_RC, (FP8_BLOCK, FP8_MAX), store, name)


def encode_fp4(weight: Tensor, scale: Tensor | None = None, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return packed FP4 codes [R, C / 2] and their scales, with each value rounded half to even; C must be even.

    Args:
        weight: floating point [R, C].
        scale: scales to use; None takes the smallest power of two under which each group fits.
        name: name of the tensor, for errors.

    Returns:
        int8 [R, C / 2] and float8_e8m0fnu [R, ceil(C / 32)].

    Raises:
        UserError: C is odd, or a value is NaN, infinite or too large for a given scale.
    """
    _check_weight(weight, name)
    if weight.shape[1] % 2:
        raise UserError(f"{name}: FP4 packs two columns in a byte and cannot store {weight.shape[1]} columns")
    table = _fp4_table(weight.device)
    is_wide = weight.dtype != torch.bfloat16  # a bf16 value has no bits below the upper 16 that the table reads

    def store(scaled: Tensor, spare: Tensor, out: Tensor) -> bool:
        bits, index = scaled.view(torch.int32), spare.view(torch.int32)
        if is_wide:  # round to odd: any lower bit sets the lowest of the 16, which avoids false ties
            bits |= torch.bitwise_and(bits, 0xFFFF, out=index).add_(0xFFFF)
        torch.bitwise_right_shift(bits, 16, out=index).add_(1 << 15)
        nibbles = table.index_select(0, index.view(-1))
        pairs = nibbles.view(torch.int16)  # [0, 2^12 + 2^4): both nibbles of a byte
        out.view(torch.uint8).copy_((pairs | pairs >> 4).view(out.shape))
        return int(nibbles.amax()) < OVERFLOW

    codes_RP = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.int8, device=weight.device)
    return codes_RP, _encode(weight, scale, codes_RP, (FP4_BLOCK, FP4_MAX), store, name)


def _check_codes(codes: Tensor, dtype: torch.dtype, name: str) -> None:
    if codes.dtype != dtype or codes.ndim != 2:
        raise UserError(f"{name}: must be {dtype} with two dimensions, is {codes.dtype} {list(codes.shape)}")


def _check_weight(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point() or weight.itemsize not in (2, 4) or weight.ndim != 2 or not weight.numel():
        raise UserError(f"{name}: cannot be encoded: is {weight.dtype} {list(weight.shape)}, not a 16 or 32 bit matrix")


def _decode(bytes_RP: Tensor, power: Tensor, block: tuple[int, int], dtype: torch.dtype, name: str) -> Tensor:
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"weights are decoded to bfloat16 or float32, not {dtype}")
    per_byte = 2 if block == FP4_BLOCK else 1
    table = _value_table(per_byte, bytes_RP.device)
    num_rows, num_columns = bytes_RP.shape[0], bytes_RP.shape[1] * per_byte
    weight = torch.empty(num_rows, num_columns, dtype=dtype, device=bytes_RP.device)
    # Only these extreme scales can overflow fp32 or fall below bf16's last subnormal bit.
    is_extreme = bool(((power > 2.0**119) | (power < 2.0**-124)).any())
    for rows in pieces(num_rows, num_columns, block[0]):
        values = _look_up(table, bytes_RP[rows].reshape(-1)).view(torch.bfloat16)
        piece = weight[rows].float() if is_extreme else weight[rows]  # otherwise each product is exact in `dtype`
        piece.copy_(values[: piece.numel()].view_as(piece))
        _scale_columns(piece, power[scale_rows(rows, block[0])].to(piece.dtype), block[1])
        if is_extreme:
            weight[rows] = piece
            if bool(piece.isinf().any()):
                raise UserError(f"{name}: a value overflows fp32 under its scale; the file is damaged")
            if not torch.equal(weight[rows].float(), piece):
                raise UserError(f"{name}: {dtype} cannot hold a value exactly under its scale; decode to float32")
    return weight


def _look_up(table: Tensor, flat_bytes: Tensor) -> Tensor:
    """Return the table entries of every two consecutive bytes; a zero follows an odd last byte."""
    if flat_bytes.numel() % 2:
        flat_bytes = torch.nn.functional.pad(flat_bytes, (0, 1))
    return table.index_select(0, flat_bytes.view(torch.int16).int().add_(1 << 15))


@cache
def _value_table(per_byte: int, device: torch.device) -> Tensor:
    """Return the bf16 values of every two bytes, packed in one integer; the index is their int16 plus 32768."""
    pairs = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    if per_byte == 1:
        return pairs.view(torch.float8_e4m3fn).bfloat16().view(torch.int32).to(device)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(-1)
    grid = torch.tensor(FP4_GRID + tuple(-value for value in FP4_GRID), dtype=torch.bfloat16)
    return grid[nibbles.long()].view(torch.int64).to(device)


@cache
def _fp4_table(device: torch.device) -> Tensor:
    """Return the nibble of every fp32 value or `OVERFLOW`, indexed by its upper 16 bits (rounded to odd) as above."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    value = (upper << 16).view(torch.float32)
    # Each entry is the code at one grid spacing; the smallest applies, and rounding half to even follows the codes.
    spacing = [value.abs() * 2, value.abs() + 2, value.abs() / 2 + 4]
    code = torch.stack(spacing).amin(0).round()
    nibble = torch.where(code < 8, code + 8 * value.signbit(), OVERFLOW)  # NaN compares false
    return nibble.to(torch.uint8).to(device)


def _encode(
    weight: Tensor,
    scale: Tensor | None,
    codes: Tensor,
    grid: tuple[tuple[int, int], float],
    store: Callable[[Tensor, Tensor, Tensor], bool],
    name: str,
) -> Tensor:
    """Fill `codes` piece by piece and return the scales; `store` returns whether all values of a piece fit the grid."""
    block, largest = grid
    shape = scale_shape((weight.shape[0], weight.shape[1]), block)
    chosen = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    if scale is not None:
        chosen.copy_(_scale_bytes(scale, shape, name))
    all_rows = pieces(weight.shape[0], weight.shape[1], block[0])
    buffers = torch.empty(2, all_rows[0].stop, weight.shape[1], device=weight.device)  # reused: fresh memory is slow
    for rows in all_rows:
        piece, spare = buffers[:, : rows.stop - rows.start].unbind()
        piece.copy_(weight[rows])
        piece_scale = chosen[scale_rows(rows, block[0])]
        if scale is None:
            piece_scale.copy_(_smallest_scale(block_amax(torch.abs(piece, out=spare), block), largest))
        _scale_columns(piece, _power_of(2 * BIAS - piece_scale.int()), block[1])
        if not store(piece, spare, codes[rows]):
            is_finite = bool(weight[rows].isfinite().all())
            reason = "is too large for the scale of its block" if is_finite else "is NaN or infinite"
            raise UserError(f"{name}: a value in rows {rows.start}..{rows.stop - 1} {reason} and cannot be encoded")
    return chosen.view(torch.float8_e8m0fnu)


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a weight [R, C]; blocks at the edges may be partial."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def powers(scale: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Return 2^(b - 127) of every scale byte, fp32, exact (2^-127 is subnormal).

    Args:
        scale: of `SCALE_DTYPES`.
        shape: expected shape of the scales.
        name: name of the tensor, for errors.

    Raises:
        UserError: wrong dtype or shape, a NaN scale, or a float32 scale that is no power of two.
    """
    return _power_of(_scale_bytes(scale, shape, name))


def _scale_bytes(scale: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Return the byte b of every scale, int32; arguments and errors as for `powers`."""
    if scale.dtype not in SCALE_DTYPES:
        raise UserError(f"{name}: its scale must be float8_e8m0fnu, uint8 or float32, is {scale.dtype}")
    if tuple(scale.shape) != shape:
        raise UserError(f"{name}: its scale must have the shape {list(shape)}, has {list(scale.shape)}")
    if scale.dtype == torch.float32:
        return _float_bytes(scale.contiguous(), name)
    exponents = scale.contiguous().view(torch.uint8).int()
    if exponents.numel() and int(exponents.amax()) == NAN_SCALE:
        raise UserError(f"{name}: a scale is NaN (byte 255); the file is damaged")
    return exponents


def _float_bytes(scale: Tensor, name: str) -> Tensor:
    """Return the byte b of every float32 scale 2^(b - 127), int32."""
    bits = scale.view(torch.int32)
    exponents = bits >> 23
    is_power = (bits & ((1 << 23) - 1) == 0) & (exponents > 0) & (exponents < NAN_SCALE) | (bits == SUBNORMAL)
    if not bool(is_power.all()):
        wrong = float(scale[~is_power][0])
        raise UserError(
            f"{name}: a scale is {wrong:g}, which is no power of two; the file is damaged or of another quantisation"
        )
    return exponents


def store_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float8_e8m0fnu scales in one of `SCALE_DTYPES`, with the same values."""
    exponents = scale.view(torch.uint8)
    return _power_of(exponents.int()) if dtype == torch.float32 else exponents.view(dtype)


def _power_of(exponents: Tensor) -> Tensor:
    """Return 2^(b - 127), fp32, for int32 b in 0..254."""
    return _power_table(exponents.device).index_select(0, exponents.reshape(-1)).view(exponents.shape)


@cache
def _power_table(device: torch.device) -> Tensor:
    return torch.ldexp(torch.ones(NAN_SCALE, dtype=torch.float64), torch.arange(NAN_SCALE) - BIAS).float().to(device)


def pieces(num_rows: int, num_columns: int, block_rows: int) -> list[slice]:
    """Return slices of consecutive rows to process together: one row of blocks, or about `CHUNK` values."""
    step = block_rows if block_rows > 1 else max(1, CHUNK // max(1, num_columns))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def scale_rows(rows: slice, block_rows: int) -> slice:
    """Return the rows of scales that belong to some rows of the weight."""
    return slice(rows.start // block_rows, math.ceil(rows.stop / block_rows))


def block_amax(magnitude: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the largest value of every block of a piece, [1 or R, groups]; the last group may be narrower."""
    if block[0] > 1:
        magnitude = magnitude.amax(0, keepdim=True)
    whole = magnitude.shape[1] // block[1] * block[1]
    parts = [magnitude[:, :whole].unflatten(1, (whole // block[1], block[1])).amax(-1)] if whole else []
    parts += [magnitude[:, whole:].amax(-1, keepdim=True)] if whole < magnitude.shape[1] else []
    return torch.cat(parts, dim=1)


def _scale_columns(values: Tensor, power: Tensor, width: int) -> None:
    """Multiply every group of `width` columns in place by its power; [rows, C] by [rows or 1, groups]."""
    whole = values.shape[1] // width
    values[:, : whole * width].unflatten(1, (whole, width)).mul_(power[:, :whole, None])
    if whole < power.shape[1]:
        values[:, whole * width :].mul_(power[:, whole:])


def _smallest_scale(amax: Tensor, largest: float) -> Tensor:
    """Return b (int32) of the smallest 2^(b - 127) with amax <= largest * 2^(b - 127); `NEUTRAL` if amax is 0."""
    mantissa, exponent = math.frexp(largest)  # largest = 2 mantissa * 2^(exponent - 1)
    # Adding this to fp32 bits carries into the exponent exactly if the mantissa exceeds that of `largest`.
    carry = (1 << 23) - 1 - int((2 * mantissa - 1) * (1 << 23))
    bits = amax.view(torch.int32)
    byte = ((bits + carry) >> 23).sub_(exponent - 1).clamp_(0, NAN_SCALE - 1)
    return byte.masked_fill_(bits == 0, NEUTRAL)
