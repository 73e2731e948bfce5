"""Hyper-connections around a sublayer: `connect` before it, `expand_and_mix` after it."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from .eager import FEWEST, connect_eager, expand_and_mix_eager
from .reference import Connection, connect_reference, expand_and_mix_reference

__all__ = ["Connection", "connect", "expand_and_mix"]


def connect(
    streams_BSND: Tensor,
    fn_MX: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> Connection:
    """Return `connect_reference`.

    Raises:
        ValueError: shapes disagree, or iterations is below 1.
    """
    num_streams, width = streams_BSND.shape[-2:]
    num_weights = num_streams * (num_streams + 2)
    if fn_MX.shape != (num_weights, num_streams * width):
        raise ValueError(f"fn_MX is {tuple(fn_MX.shape)} but must be ({num_weights}, {num_streams * width})")
    if base_M.shape != (num_weights,) or scale_3.shape != (3,):
        raise ValueError(
            f"base_M {tuple(base_M.shape)}, scale_3 {tuple(scale_3.shape)}: must be ({num_weights},), (3,)"
        )
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    if use_triton("hyper_connection", streams_BSND, _unfit(streams_BSND)):
        from .kernel import connect_triton  # needs Triton, which a machine without a GPU may lack

        op = connect_triton
    else:
        op = connect_eager if _suits_eager(streams_BSND) else connect_reference
    return op(streams_BSND, fn_MX, base_M, scale_3, norm_eps=norm_eps, eps=eps, iterations=iterations)


def expand_and_mix(post_BSN: Tensor, comb_BSNN: Tensor, output_BSD: Tensor, streams_BSND: Tensor) -> Tensor:
    """Return `expand_and_mix_reference`; Triton sums in float32 even where the definition rounds parts to bfloat16.

    Raises:
        ValueError: shapes disagree.
    """
    *shape, num_streams, width = streams_BSND.shape
    shapes = [tuple(x.shape) for x in (post_BSN, comb_BSNN, output_BSD)]
    needed = [(*shape, *rest) for rest in ((num_streams,), (num_streams, num_streams), (width,))]
    if shapes != needed:
        raise ValueError(f"post, comb and output are {shapes} but these streams need {needed}")
    if use_triton("hyper_connection", streams_BSND, _unfit(streams_BSND)):
        from .expand_kernel import expand_and_mix_triton  # needs Triton, which a machine without a GPU may lack

        return expand_and_mix_triton(post_BSN, comb_BSNN, output_BSD, streams_BSND)
    op = expand_and_mix_eager if _suits_eager(streams_BSND) else expand_and_mix_reference
    return op(post_BSN, comb_BSNN, output_BSD, streams_BSND)


def _suits_eager(streams_BSND: Tensor) -> bool:
    """Return whether passes over memory cost more than calls: many tokens on a CPU, in float32 or less."""
    num_tokens = streams_BSND.shape[0] * streams_BSND.shape[1]
    return streams_BSND.is_cpu and num_tokens >= FEWEST and streams_BSND.dtype is not torch.float64


def _unfit(streams_BSND: Tensor) -> str | None:
    return "its streams are float64" if streams_BSND.dtype is torch.float64 else None
