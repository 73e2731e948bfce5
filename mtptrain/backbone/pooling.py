"""Pool the projected inputs of a window of tokens into its compressed entry."""

# B rows, M windows, T tokens of a window, F channels of the raw inputs, C of an entry, r rotated channel pairs

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4CSACompressor,
    DeepseekV4HCACompressor,
    DeepseekV4Indexer,
)

from mtptrain.backbone.modules import norm_and_rotate_

Compressor = (
    DeepseekV4HCACompressor | DeepseekV4CSACompressor | DeepseekV4Indexer
)  # all three pool windows in the same way


def pool_windows(
    module: Compressor, kv_BMTF: Tensor, gate_BMTF: Tensor, first_BM11: Tensor, rope_BMr: Tensor
) -> Tensor:
    """Return the entries [B, M, C] of M windows.

    Args:
        module: the compressor, or the indexer of CSA.
        kv_BMTF: projected inputs; overlapping windows also need the window before the first, so M + 1 of them.
        gate_BMTF: logits of their weights, in the same shape.
        first_BM11: bool, true for window 0, which has no window before it.
        rope_BMr: complex64 rotation of each entry, taken at its window's first position.

    Source: DeepSeek-V4 paper, sections 2.3.1 and 2.3.2.
    """
    gate_BMTF = gate_BMTF + module.position_bias
    if not isinstance(module, DeepseekV4HCACompressor):
        kv_BMTF, gate_BMTF = _overlap(kv_BMTF), _overlap(gate_BMTF)
        gate_BMTF[:, :, : module.compress_rate].masked_fill_(first_BM11, float("-inf"))
    weight_BMTC = gate_BMTF.softmax(dim=2, dtype=torch.float32).to(kv_BMTF.dtype)
    return norm_and_rotate_(module.kv_norm, (kv_BMTF * weight_BMTC).sum(dim=2), rope_BMr)


def _overlap(x_BMTF: Tensor) -> Tensor:
    """Join the first half of the window before with the second of each: [B, M + 1, rate, 2C] -> [B, M, 2 rate, C]."""
    before_BMTF, after_BMTF = x_BMTF.chunk(2, dim=-1)
    return torch.cat([before_BMTF[:, :-1], after_BMTF[:, 1:]], dim=2)
