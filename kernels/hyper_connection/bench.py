"""`hyper_connection` around an empty sublayer, forward and every gradient, beside torch.compile of the definition.

The definition computes as transformers does eagerly. T tokens, N streams, D model width, M = N * (N + 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..bench.case import Case, Outputs
from . import connect, expand_and_mix
from .reference import connect_reference, expand_and_mix_reference

SIZES = {"cpu": [(1024, 2, 128, 4)], "cuda": [(8192, 4, 4096, 20), (8192, 4, 7168, 20)]}  # T, N, D, iterations


def cases(device: torch.device, sizes: str) -> Iterator[Case]:
    """Yield the comparisons of one list of sizes; those of "cpu" have the tiny backbone's size."""
    for size in SIZES[sizes]:
        yield _case(device, *size)


def _around(connect: Callable[..., tuple[Tensor, ...]], expand: Callable[..., Tensor], iterations: int) -> Callable:
    def run(streams: Tensor, *weights: Tensor) -> Tensor:
        post, comb, collapsed, streams = connect(streams, *weights, norm_eps=1e-6, eps=1e-6, iterations=iterations)
        return expand(post, comb, collapsed, streams)

    return run


def _case(device: torch.device, T: int, N: int, D: int, iterations: int) -> Case:
    dtype, M = torch.bfloat16 if device.type == "cuda" else torch.float32, N * (N + 2)
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int, size: float = 0.3) -> Tensor:
        return size * torch.randn(shape, generator=generator, device=device)

    inputs = [values(1, T, N, D, size=1).to(dtype), values(M, N * D, size=D**-0.5), values(M), values(3)]
    grad = values(1, T, N, D, size=1).to(dtype)

    def with_gradient(op: Callable[..., Tensor]) -> Callable[[], Outputs]:
        leaves = [x.detach().requires_grad_() for x in inputs]

        def run() -> Outputs:
            out = op(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad))

        return run

    definition = _around(connect_reference, expand_and_mix_reference, iterations)
    streams_bytes = T * N * D * grad.element_size()
    return Case(
        label=f"{T} tokens, N {N}, D {D}, {iterations} iterations, {dtype}: forward and gradients",
        ours=with_gradient(_around(connect, expand_and_mix, iterations)),
        definition=with_gradient(definition),
        peers={"torch.compile of definition": with_gradient(torch.compile(definition, dynamic=False))},
        # In a model a sublayer runs between the two, so each must read the streams. In units of the streams, forward: 2
        # reads, 1 write. Backward: `expand` also reads a gradient and writes one, which `connect` reads and adds, so 4
        # reads, 2 writes. The sublayer's tensors are 1/N of a unit each: its input and output once forward, its output
        # and both gradients once backward.
        bytes=9 * streams_bytes + 5 * streams_bytes // N,
        flops=3 * 2 * T * M * N * D,
        rtol=1e-4 if dtype is torch.float32 else 2**-6,
        atol=1e-4 if dtype is torch.float32 else 2**-6,
    )
