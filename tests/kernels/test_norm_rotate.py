"""Norm and rotation: the definition against transformers, and the Triton functions against the definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm, apply_rotary_pos_emb

from mtptrain.kernels.norm_rotate import bench, norm_and_rotate, rotate_
from mtptrain.kernels.norm_rotate.kernel import norm_and_rotate_triton, rotate_in_place_triton
from mtptrain.kernels.norm_rotate.reference import (
    norm_and_rotate_reference,
    rotate_in_place_reference,
    rotate_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
ROUNDING = 2**-8 if DEVICE == "cuda" else 2**-7  # to bf16; the interpreter cuts bits off

# B rows, S tokens, H heads, C channels, r rotated channel pairs

# B, S, H, C, r: one channel pair and all of them; channels, pairs and heads that are no powers of two
SHAPES = [(1, 1, 1, 2, 1), (2, 2, 1, 70, 3), (1, 2, 3, 16, 8), (1, 2, 8, 12, 4)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def turns(*shape: int) -> Tensor:
    angle = 3 * values(*shape)
    return torch.polar(torch.ones_like(angle), angle)


def run(op: Callable[..., Tensor], x: Tensor, turn: Tensor, weight: Tensor | None = None) -> list[Tensor]:
    """Return the output, and the gradients of a random scalar of it."""
    leaves = [value.detach().requires_grad_() for value in (x, weight) if value is not None]
    out = op(leaves[0], turn, *leaves[1:])
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad((out * factor).sum(), leaves)]


def normed(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, turn, *weight: op(x, turn, *weight, eps=EPS)


def assert_close(actual: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Compare up to `eps` times each tensor's largest value, at least 1."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=eps * max([1.0, *theirs.abs().flatten().tolist()]), rtol=0)


def test_the_definition_equals_transformers() -> None:
    norm, x, turn = DeepseekV4RMSNorm(24, eps=EPS), values(2, 5, 3, 24).cpu(), turns(2, 5, 4).cpu()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    expected = apply_rotary_pos_emb(norm(x), turn.real, turn.imag, unsqueeze_dim=2)
    ours = norm_and_rotate_reference(x, turn.unsqueeze(2), norm.weight, eps=EPS)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("B", "S", "H", "C", "r"), SHAPES)
@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_norms_and_rotates_like_the_definition(B: int, S: int, H: int, C: int, r: int, weighted: bool) -> None:
    x_BHSC, turn_B1Sr = values(B, S, H, C).transpose(1, 2), turns(B, 1, S, r)
    arguments = (x_BHSC, turn_B1Sr, values(C) if weighted else None)
    actual = run(normed(norm_and_rotate_triton), *arguments)
    # A mean of C values and a weight's gradient over all rows, in another order.
    assert_close(actual, run(normed(norm_and_rotate_reference), *arguments), 32 * 2**-23)
    assert actual[0].stride() == x_BHSC.stride()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("_poisoned_memory")
def test_triton_norms_and_rotates_bfloat16_like_the_definition(weighted: bool) -> None:
    x_BSC, turn_1Sr = values(2, 3, 22, dtype=torch.bfloat16), turns(1, 3, 5)
    arguments = (x_BSC, turn_1Sr, values(22) if weighted else None)
    actual = run(normed(norm_and_rotate_triton), *arguments)
    # Two roundings of the output, and in the definition of parts of the gradient.
    assert_close(actual, run(normed(norm_and_rotate_reference), *arguments), 3 * ROUNDING)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_zeros_stay_zero_and_have_a_finite_gradient(weighted: bool) -> None:
    arguments = (torch.zeros(1, 2, 12, device=DEVICE), turns(1, 2, 3), values(12) if weighted else None)
    actual = run(normed(norm_and_rotate_triton), *arguments)
    assert not actual[0].any()
    # The gradient is that of 1 / rms = 1000.
    assert_close(actual, run(normed(norm_and_rotate_reference), *arguments), 4 * 2**-23)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 3, 12)])
def test_no_tokens_have_an_empty_output_and_no_gradient(shape: tuple[int, ...]) -> None:
    x, turn = torch.zeros(shape, device=DEVICE), turns(*shape[:-1], 2)
    out, grad_x, grad_weight = run(normed(norm_and_rotate_triton), x, turn, values(12))
    assert out.shape == grad_x.shape == shape
    assert not grad_weight.any()
    assert rotate_in_place_triton(x, turn).shape == shape


def test_any_layout_of_input_turns_and_gradient_is_read() -> None:
    x_BSC = values(12, 6, 2).permute(2, 1, 0)  # channels are not contiguous
    turn_Sr, weight = turns(3, 6).T, values(24)[::2]
    arguments = (x_BSC, turn_Sr, weight)
    actual = run(normed(norm_and_rotate_triton), *arguments)
    assert_close(actual, run(normed(norm_and_rotate_reference), *arguments), 8 * 2**-23)
    leaf_SC = values(6, 24)[:, ::2].requires_grad_()
    # Of a gradient that is expanded.
    (ours,) = torch.autograd.grad(norm_and_rotate_triton(leaf_SC, turn_Sr, eps=EPS).sum(), leaf_SC)
    (theirs,) = torch.autograd.grad(norm_and_rotate_reference(leaf_SC.contiguous(), turn_Sr, eps=EPS).sum(), leaf_SC)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_frozen_weight_and_a_frozen_input_change_no_gradient() -> None:
    x, turn, weight = values(5, 12), turns(5, 3), values(12)
    _, grad_x, grad_weight = run(normed(norm_and_rotate_triton), x, turn, weight)
    leaf, other = x.clone().requires_grad_(), weight.clone().requires_grad_()
    factor = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)
    (alone,) = torch.autograd.grad((norm_and_rotate_triton(leaf, turn, weight, eps=EPS) * factor).sum(), leaf)
    assert torch.equal(alone, grad_x)
    (alone,) = torch.autograd.grad((norm_and_rotate_triton(x, turn, other, eps=EPS) * factor).sum(), other)
    assert torch.equal(alone, grad_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_in_place_equals_one_into_a_copy(dtype: torch.dtype) -> None:
    x_BSHC, turn_BS1r = values(2, 3, 3, 20, dtype=dtype), turns(2, 3, 1, 4).conj()
    expected = rotate_reference(x_BSHC, turn_BS1r)
    inside = torch.full((2, 3, 5, 24), 7.0, dtype=dtype, device=DEVICE)  # of another layout, with neighbours
    for op, eps in ((rotate_in_place_reference, 0.0), (rotate_in_place_triton, 2 * ROUNDING)):
        x = inside[:, :, 1:4, 2:22].copy_(x_BSHC)
        assert op(x, turn_BS1r) is x
        assert_close([x], [expected], eps if dtype is torch.bfloat16 else 2**-22)
        assert torch.equal(x[..., :12], x_BSHC[..., :12])
    x.fill_(7.0)
    assert (inside == 7.0).all()


def test_shapes_that_disagree_are_refused() -> None:
    x, turn = values(2, 3, 8), turns(2, 3, 2)
    with pytest.raises(ValueError, match=r"weight is \(4,\) but must be \(8,\)"):
        norm_and_rotate(x, turn, values(4), eps=EPS)
    with pytest.raises(ValueError, match="rotates 10 channels, and x has 8"):
        rotate_(x, turns(2, 3, 5))
    for shape in ((3, 3, 2), (2, 2, 3, 2)):
        with pytest.raises(ValueError, match="does not broadcast over x"):
            rotate_(x, turns(*shape))


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted on a GPU")
def test_a_tensor_that_needs_a_gradient_is_rotated_in_place_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTPTRAIN_KERNELS", "triton")
    leaf, turn = values(3, 8).requires_grad_(), turns(3, 2)
    (grad,) = torch.autograd.grad(rotate_(leaf * 1, turn).sum(), leaf)
    (expected,) = torch.autograd.grad(rotate_reference(leaf, turn).sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_the_cases_of_the_bench_agree() -> None:
    for case in bench.cases(torch.device("cpu"), "cpu"):
        assert case.difference(case.ours(), case.definition()) is None
