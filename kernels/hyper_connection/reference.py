"""Definition of how a sublayer's output re-enters the residual streams of a hyper-connection."""

# B rows, S tokens, N residual streams, D model width

from __future__ import annotations

import torch
from torch import Tensor


def expand_and_mix_reference(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """Streams after a sublayer: its output expanded by `post`, plus the streams mixed by `comb` transposed.

    Args:
        post_BSN: float32 weight of the output in each stream.
        comb_BSNN: float32 doubly stochastic mixing matrix, [from, to].
        output_BSD: the sublayer's output.
        streams_BSND: the streams before the sublayer.

    Returns:
        [B, S, N, D] in the streams' dtype.

    Source: DeepSeek-V4 paper, section 2.2; `DeepseekV4DecoderLayer.forward` of transformers.
    """
    dtype = streams_BSND.dtype
    mixed_BSND = torch.matmul(comb_BSNN.to(dtype).transpose(-1, -2), streams_BSND)
    return post_BSN.to(dtype).unsqueeze(-1) * output_BSD.unsqueeze(-2) + mixed_BSND
