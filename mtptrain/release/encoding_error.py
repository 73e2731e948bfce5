"""The error that storing a tensor adds to its values."""

# R rows, C columns

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mtptrain.release.codec import block_amax, pieces, powers, scale_rows, scale_shape


@dataclass(frozen=True)
class EncodingError:
    """The largest difference between a tensor and its decoded encoding.

    Attributes:
        absolute: largest |weight - decoded|.
        relative: the same in units of each block's scale, at most half a grid step: 16 for FP8, 1 for FP4.
    """

    absolute: float
    relative: float


def encoding_error(weight: Tensor, decoded: Tensor, scale: Tensor, block: tuple[int, int]) -> EncodingError:
    """Return the error of one tensor, computed in pieces of rows.

    Args:
        weight: floating point [R, C], before encoding.
        decoded: floating point [R, C], decoded from the codes.
        scale: the scales that `encode_fp8` or `encode_fp4` returned.
        block: `FP8_BLOCK` or `FP4_BLOCK`.
    """
    power = powers(scale, scale_shape((weight.shape[0], weight.shape[1]), block), "scale")
    absolute = relative = 0.0
    for rows in pieces(weight.shape[0], weight.shape[1], block[0]):
        gap = (weight[rows].double() - decoded[rows].double()).abs_()
        absolute = max(absolute, float(gap.amax()))
        relative = max(relative, float((block_amax(gap, block) / power[scale_rows(rows, block[0])].double()).amax()))
    return EncodingError(absolute, relative)


def rounding_error(weight: Tensor, stored: Tensor) -> EncodingError:
    """Return the error of a tensor stored without scales, relative to the power of two below its largest magnitude.

    Args:
        weight: floating point, any shape.
        stored: the same after rounding; the relative error of bf16 is at most 2^-8.
    """
    absolute = float((weight.float() - stored.float()).abs().amax())
    _, exponent = math.frexp(float(weight.abs().amax()))
    return EncodingError(absolute, math.ldexp(absolute, 1 - exponent))
