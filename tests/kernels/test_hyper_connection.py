"""Hyper-connections: the definition against transformers, and the Triton functions against the definition."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.hyper_connection import bench
from mtptrain.kernels.hyper_connection.eager import connect_eager, expand_and_mix_eager
from mtptrain.kernels.hyper_connection.expand_kernel import expand_and_mix_triton
from mtptrain.kernels.hyper_connection.kernel import connect_triton
from mtptrain.kernels.hyper_connection.reference import connect_reference, expand_and_mix_reference
from tests.tiny import random_backbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"norm_eps": 1e-6, "eps": 1e-6}

# B rows, S tokens, N streams, D model width, M = N * (N + 2) weights

# B, S, N, D, Sinkhorn iterations
SHAPES = [(1, 1, 1, 8, 1), (1, 17, 1, 8, 1), (2, 3, 2, 20, 4), (1, 5, 4, 48, 20), (1, 5, 3, 150, 2)]


def random_values(*shapes: tuple[int, ...], size: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [(torch.randn(shape, generator=generator) * size).to(dtype).to(DEVICE) for shape in shapes]


def connect_inputs(
    B: int, S: int, N: int, D: int, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    M = N * (N + 2)
    (streams,) = random_values((B, S, N, D), size=size, dtype=dtype)
    return [streams, *random_values((M, N * D), (M,), (3,), size=0.3)]


def expand_inputs(B: int, S: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [*random_values((B, S, N), (B, S, N, N)), *random_values((B, S, D), (B, S, N, D), dtype=dtype)]


def run(op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], **settings: float) -> list[Tensor]:
    """Return all outputs, and every gradient of a random scalar of them."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    results = op(*leaves, **settings)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(9)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum().float() for out in outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, leaves)]


def assert_close(actual: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Compare up to `eps` times each tensor's largest value, at least 1."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=eps * max(1.0, theirs.abs().max().item()), rtol=0)


def test_the_definition_equals_transformers() -> None:
    model = random_backbone()
    module = model.model.layers[1].ffn_hc
    (streams,) = random_values((2, 7, model.config.hc_mult, model.config.hidden_size))
    ours = connect_reference(
        streams.cpu(),
        module.fn,
        module.base,
        module.scale,
        norm_eps=module.input_norm.eps,
        eps=module.hc_eps,
        iterations=module.hc_sinkhorn_iters,
    )
    for actual, expected in zip(ours, (*module(streams.cpu()), streams.cpu()), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("B", "S", "N", "D", "iterations"), SHAPES)
@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_connects_like_the_definition(B: int, S: int, N: int, D: int, iterations: int) -> None:
    inputs, settings = connect_inputs(B, S, N, D), {**SETTINGS, "iterations": iterations}
    # Sums of N * D terms and their gradients through up to 40 divisions: 64 ulps of fp32.
    assert_close(run(connect_triton, inputs, **settings), run(connect_reference, inputs, **settings), 64 * 2**-23)


@pytest.mark.parametrize(("B", "S", "N", "D", "iterations"), SHAPES)
@pytest.mark.usefixtures("_poisoned_memory")
def test_few_passes_equal_the_definition(B: int, S: int, N: int, D: int, iterations: int) -> None:
    inputs, settings = connect_inputs(B, S, N, D), {**SETTINGS, "iterations": iterations}
    # Bounds as for Triton: sums of N * D terms and their gradients through divisions; sums of N terms and of D.
    assert_close(run(connect_eager, inputs, **settings), run(connect_reference, inputs, **settings), 64 * 2**-23)
    inputs = expand_inputs(B, S, N, D)
    assert_close(run(expand_and_mix_eager, inputs), run(expand_and_mix_reference, inputs), 4 * 2**-23)


def test_few_passes_take_bfloat16_streams() -> None:
    inputs, settings = connect_inputs(2, 5, 4, 60, dtype=torch.bfloat16), {**SETTINGS, "iterations": 20}
    # One rounding to bf16; the definition rounds its parts of the streams' gradient one by one.
    assert_close(run(connect_eager, inputs, **settings), run(connect_reference, inputs, **settings), 3 * 2**-8)
    inputs = expand_inputs(2, 5, 4, 60, torch.bfloat16)
    assert_close(run(expand_and_mix_eager, inputs), run(expand_and_mix_reference, inputs), 4 * 2**-8)


@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_connects_bfloat16_streams_like_the_definition() -> None:
    inputs, settings = connect_inputs(1, 5, 4, 600, dtype=torch.bfloat16), {**SETTINGS, "iterations": 20}
    # One rounding to bf16; the definition rounds its parts of the streams' gradient one by one.
    assert_close(run(connect_triton, inputs, **settings), run(connect_reference, inputs, **settings), 3 * 2**-8)


def test_streams_that_are_passed_on_get_the_same_gradient_as_streams_used_twice() -> None:
    inputs, settings = connect_inputs(1, 3, 2, 20), {**SETTINGS, "iterations": 2}

    def around(*inputs: Tensor, passed: bool) -> Tensor:
        post, comb, collapsed, streams = connect_triton(*inputs, **settings)
        return expand_and_mix_triton(post, comb, collapsed, streams if passed else inputs[0])

    # The two gradients are added before or after a rounding to fp32.
    assert_close(run(around, inputs, passed=True), run(around, inputs, passed=False), 4 * 2**-23)


@pytest.mark.usefixtures("_poisoned_memory")
def test_streams_get_the_same_gradient_when_the_projection_is_frozen() -> None:
    inputs, settings = connect_inputs(1, 3, 2, 20), {**SETTINGS, "iterations": 2}
    gradients = []
    for needs_gradient in (True, False):
        streams, *weights = (x.detach().requires_grad_(needs_gradient) for x in inputs)
        outputs = connect_triton(streams.requires_grad_(), *weights, **settings)
        gradients += torch.autograd.grad([x.sum() for x in outputs], streams)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_streams_of_any_size_are_connected(size: float) -> None:
    inputs, settings = connect_inputs(1, 3, 2, 16, size=size), {**SETTINGS, "iterations": 4}
    actual, expected = run(connect_triton, inputs, **settings), run(connect_reference, inputs, **settings)
    # At 0 the gradient of the streams is that of 1 / rms = 1000.
    assert_close(actual, expected, 256 * 2**-23)


def test_weights_that_saturate_stay_finite() -> None:
    inputs = connect_inputs(1, 3, 4, 16)
    inputs[3] = torch.full((3,), 1e4, device=DEVICE)  # logits of 1e4: softmax and sigmoid are 0 or 1
    settings = {**SETTINGS, "iterations": 20}
    actual, expected = run(connect_triton, inputs, **settings), run(connect_reference, inputs, **settings)
    assert all(value.isfinite().all() for value in actual)
    assert_close(actual[:3], expected[:3], 2**-10)  # one ulp of a logit is 1e-3


@pytest.mark.parametrize(("B", "S", "N", "D", "_iterations"), SHAPES)
@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_expands_and_mixes_like_the_definition(B: int, S: int, N: int, D: int, _iterations: int) -> None:
    inputs = expand_inputs(B, S, N, D)
    assert_close(run(expand_and_mix_triton, inputs), run(expand_and_mix_reference, inputs), 16 * 2**-23)


@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_expands_bfloat16_like_the_definition_in_float32() -> None:
    inputs = expand_inputs(1, 5, 4, 600, dtype=torch.bfloat16)
    expected = run(expand_and_mix_reference, [value.float() for value in inputs])
    actual = [value.float() for value in run(expand_and_mix_triton, inputs)]
    assert_close(actual, expected, 2 * 2**-8)  # one rounding to bf16 of outputs and of the scalar's weights


def test_the_cases_of_the_bench_agree() -> None:
    for case in bench.cases(torch.device("cpu"), "cpu"):
        assert case.difference(case.ours(), case.definition()) is None
