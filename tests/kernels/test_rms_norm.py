"""The RMS norm for a CPU against torch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mtptrain.kernels.norm_rotate import rms_norm
from mtptrain.kernels.norm_rotate.eager import FEWEST, rms_norm_eager


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_the_norm_equals_torch(size: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 3, 63), (63,), (2, 5, 3, 63)))
    results = []
    for op in (rms_norm_eager, lambda x, weight, eps: F.rms_norm(x, (63,), weight, eps)):
        leaves = [(size * x).requires_grad_(), *([weight.clone().requires_grad_()] if weighted else [])]
        out = op(leaves[0], leaves[1] if weighted else None, 1e-6)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for actual, expected in zip(*results, strict=True):  # sums of 63 products and their square root: 16 ulps of fp32
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=16 * 2**-23 * largest)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(FEWEST // 64, 64, requires_grad=True), torch.ones(64)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
