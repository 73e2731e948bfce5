"""From per-token losses to the number that is minimised.

K draft steps, T tokens, A anchors.
"""

import torch
from torch import Tensor


def weighted_loss(loss_KT: Tensor, counts_K: Tensor, weights_K: Tensor) -> Tensor:
    """Share of this micro-batch in sum_k w_k * (mean loss of step k over the global batch).

    Shares of all micro-batches and ranks ADD UP to the loss, so none is divided again: a trainer that averages
    gradients over R ranks multiplies by R. A step without a valid token contributes 0.

    Args:
        loss_KT: floating, 0 at masked tokens, as `linear_loss` returns it.
        counts_K: int64 or float64, valid tokens of each step in the whole global batch.
        weights_K: floating, see `step_weights`.

    Returns:
        Scalar of loss_KT's dtype.

    Raises:
        ValueError: the three disagree on the number of steps.

    """
    steps = loss_KT.shape[0]
    if counts_K.shape != (steps,) or weights_K.shape != (steps,):
        raise ValueError(
            f"loss_KT has {steps} steps but counts_K is {tuple(counts_K.shape)} and weights_K {tuple(weights_K.shape)};"
            f" both must be [{steps}]"
        )
    scale_K = torch.where(counts_K > 0, weights_K.double() / counts_K.clamp(min=1), 0.0)
    return (loss_KT.sum(-1) * scale_K.to(loss_KT.dtype)).sum()


def chain_loss(alpha_KA: Tensor, mask_KA: Tensor) -> Tensor:
    """Shortfall of each anchor's expected accepted length: sum over valid k of 1 - prod_{j<=k} alpha_j.

    Minimising it maximises the expected number of accepted draft tokens; it is 0 for a perfect head.

    Args:
        alpha_KA: floating acceptance of step k at anchor a, in [0, 1], differentiable (1 - the tv loss).
        mask_KA: bool, True on the first steps of an anchor up to its last valid one. Masked values may be anything.

    Returns:
        [A] of alpha_KA's dtype, 0 for an anchor without a valid step.

    Raises:
        ValueError: shapes differ, or a step is valid after one that is not.

    Source: arXiv:2606.12370.

    """
    if alpha_KA.shape != mask_KA.shape:
        raise ValueError(f"alpha_KA {tuple(alpha_KA.shape)} and mask_KA {tuple(mask_KA.shape)} must have one shape")
    if (mask_KA[1:] & ~mask_KA[:-1]).any():
        raise ValueError("mask_KA has a valid step after a masked one; a chain ends at its first masked step")
    accepted_KA = alpha_KA.masked_fill(~mask_KA, 1).cumprod(0)
    return (1 - accepted_KA).masked_fill(~mask_KA, 0).sum(0)
