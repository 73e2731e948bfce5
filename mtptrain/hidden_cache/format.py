"""The storage formats of residual streams in a cache."""

# T tokens, N residual streams, D model width

from __future__ import annotations

import torch
from torch import Tensor

from mtptrain.config import StreamFormat

DTYPES = {
    StreamFormat.fp32: torch.float32,
    StreamFormat.bf16: torch.bfloat16,
    StreamFormat.fp8: torch.float8_e4m3fn,
}
FP8_MAX = 448.0  # largest e4m3 value


def shard_file(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard_{number:05d}.safetensors"


def bytes_a_token(stored_as: StreamFormat, num_streams: int, width: int) -> int:
    """Return the bytes of one token's streams, scales included."""
    scales = 4 * num_streams if stored_as is StreamFormat.fp8 else 0
    return num_streams * width * DTYPES[stored_as].itemsize + scales


def encode_streams(streams_TND: Tensor, stored_as: StreamFormat) -> dict[str, Tensor]:
    """Return streams as stored: `streams` [T, N, D] and, for fp8, `scales`, float32 [T, N]: largest magnitude / 448."""
    if stored_as is not StreamFormat.fp8:
        return {"streams": streams_TND.to(DTYPES[stored_as])}
    values_TND = streams_TND.float()
    scales_TN = values_TND.abs().amax(-1) / FP8_MAX
    scales_TN = torch.where(scales_TN > 0, scales_TN, 1.0)
    scaled_TND = (values_TND / scales_TN.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return {"streams": scaled_TND.to(torch.float8_e4m3fn), "scales": scales_TN}


def decode_streams(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the streams [T, N, D] of `encode_streams`, in `dtype`."""
    if "scales" not in stored:
        return stored["streams"].to(dtype)
    return (stored["streams"].float() * stored["scales"].unsqueeze(-1)).to(dtype)
