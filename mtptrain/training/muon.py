"""Muon: steps along the momentum, orthogonalised matrix by matrix.

A stack [E, P, Q], such as transformers' tensor of a layer's experts, is E matrices. Matrices of one shape, or of its
transpose, are orthogonalised as one batch.

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the factor of a step is equation 4 of Moonlight,
arXiv:2502.16982: steps have the root mean square of AdamW's. torch.optim.Muon is the same for one matrix, in bf16.
"""

# N matrices of a batch, P and Q their sizes, P <= Q

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
ROOT_MEAN_SQUARE = 0.2
LEAST_NORM = 1e-7
BATCH = 2**26  # values that are orthogonalised together, or one matrix; bounds the temporaries


def orthogonalize(matrix_NPQ: Tensor) -> Tensor:
    """Return matrices with the singular vectors of the given ones and all singular values near 1.

    The values end between about 0.7 and 1.2. The products are in bf16 on a GPU; a CPU may have no unit for it, and
    computes in fp32.

    Args:
        matrix_NPQ: floating, P <= Q.
    """
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrix_NPQ.is_cuda else torch.float32
    norm_N = torch.linalg.vector_norm(matrix_NPQ, dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    out_NPQ = (matrix_NPQ / norm_N).to(dtype)
    del matrix_NPQ
    for _ in range(ITERATIONS):
        gram_NPP = out_NPQ @ out_NPQ.mT
        factor_NPP = torch.baddbmm(gram_NPP, gram_NPP, gram_NPP, beta=b, alpha=c)
        out_NPQ = torch.baddbmm(out_NPQ, factor_NPP, out_NPQ, beta=a)
    return out_NPQ


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay.

    Its state is `momentum_buffer` of each tensor, in the tensor's dtype.

    Args:
        parameters: matrices, or stacks of them.
        rate: learning rate, that of an AdamW.
        weight_decay: share of a weight that a step at rate 1 removes.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                momentum = self.state[p].get("momentum_buffer")
                if momentum is None:
                    momentum = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                p.mul_(1 - group["lr"] * group["weight_decay"])
            for batch in _batches([triple for p in trained for triple in self._matrices(p)]):
                _update(batch, group["lr"])

    def _matrices(self, parameter: Tensor) -> list[tuple[Tensor, ...]]:
        """Return weight, gradient and momentum of each matrix of a tensor, transposed if it is tall."""
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, self.state[parameter]["momentum_buffer"])
        flat = [tensor.flatten(0, -3) if tensor.ndim > 2 else tensor[None] for tensor in tensors]
        is_tall = parameter.shape[-2] > parameter.shape[-1]
        return list(zip(*((one.mT if is_tall else one).unbind() for one in flat), strict=True))


def _batches(matrices: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield matrices of one shape, of at most `BATCH` values together."""
    for shape in dict.fromkeys(weight.shape for weight, _, _ in matrices):
        same = [triple for triple in matrices if triple[0].shape == shape]
        size = max(1, BATCH // shape.numel())
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _update(batch: list[tuple[Tensor, ...]], rate: float) -> None:
    """Move weights of one shape."""
    step_NPQ = orthogonalize(torch.stack([gradient.lerp(momentum, MOMENTUM) for _, gradient, momentum in batch]))
    factor = ROOT_MEAN_SQUARE * math.sqrt(step_NPQ.shape[-1])
    for (weight, _, _), step_PQ in zip(batch, step_NPQ, strict=True):
        weight.add_(step_PQ, alpha=-rate * factor)
