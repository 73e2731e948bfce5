"""Definition of a hyper-connection: from residual streams to a sublayer's input, and from its output back to them.

Source: DeepSeek-V4 paper, section 2.2; `DeepseekV4HyperConnection` and `DeepseekV4DecoderLayer` of transformers.
"""

# B rows, S tokens, N residual streams, D model width, M = N * (N + 2) weights of a token, X = N * D

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Connection(NamedTuple):
    """A sublayer's input, and the weights that take its output back into the streams."""

    post_BSN: Tensor  # float32 in (0, 2), weight of the output in each stream
    comb_BSNN: Tensor  # float32 [from, to], columns sum to 1, rows too once Sinkhorn has converged
    collapsed_BSD: Tensor  # the sublayer's input, in the streams' dtype
    streams_BSND: Tensor  # unchanged; pass these to `expand_and_mix`, so that one launch adds both their gradients


def connect_reference(
    streams_BSND: Tensor,
    fn_MX: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> Connection:
    """Return the weights of every token's hyper-connection, and its streams collapsed by them.

    Args:
        streams_BSND: residual streams, floating.
        fn_MX: projection of the normed, flattened streams: N rows for `pre`, N for `post`, N * N for `comb`.
        base_M: added to the projections.
        scale_3: factors of the three kinds of projections.
        norm_eps: epsilon of the RMS norm.
        eps: keeps `pre` and the sums of `comb` above 0.
        iterations: Sinkhorn iterations, at least 1; each divides by the row sums, then by the column sums, except the
            first, which divides by the column sums only.
    """
    num_streams = streams_BSND.shape[2]
    flat_BSX = streams_BSND.flatten(2).float()
    normed_BSX = flat_BSX * torch.rsqrt(flat_BSX.square().mean(-1, keepdim=True) + norm_eps)
    sizes = [num_streams, num_streams, num_streams**2]
    projected = torch.nn.functional.linear(normed_BSX, fn_MX.float()).split(sizes, dim=-1)
    pre, post, comb = (x * s + b for x, s, b in zip(projected, scale_3.unbind(0), base_M.split(sizes), strict=True))
    comb_BSNN = comb.unflatten(-1, (num_streams, num_streams)).softmax(-1) + eps
    comb_BSNN = comb_BSNN / (comb_BSNN.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb_BSNN = comb_BSNN / (comb_BSNN.sum(-1, keepdim=True) + eps)
        comb_BSNN = comb_BSNN / (comb_BSNN.sum(-2, keepdim=True) + eps)
    collapsed_BSD = ((pre.sigmoid() + eps).unsqueeze(-1) * streams_BSND).sum(dim=2).to(streams_BSND.dtype)
    return Connection(2 * post.sigmoid(), comb_BSNN, collapsed_BSD, streams_BSND)


def expand_and_mix_reference(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """Return the streams after a sublayer: its output expanded by `post`, plus the streams mixed by `comb` transposed.

    Args:
        post_BSN: float32 weight of the output in each stream.
        comb_BSNN: float32 doubly stochastic mixing matrix, [from, to].
        output_BSD: the sublayer's output.
        streams_BSND: the streams before the sublayer.

    Returns:
        [B, S, N, D] in the streams' dtype.
    """
    dtype = streams_BSND.dtype
    mixed_BSND = torch.matmul(comb_BSNN.to(dtype).transpose(-1, -2), streams_BSND)
    return post_BSN.to(dtype).unsqueeze(-1) * output_BSD.unsqueeze(-2) + mixed_BSND
