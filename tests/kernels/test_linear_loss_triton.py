"""The Triton functions of `linear_loss`: compiled on a GPU, interpreted elsewhere."""

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.linear_loss import Divergence, LinearLoss, kernel
from mtptrain.kernels.linear_loss.chunked import linear_loss_in_chunks
from mtptrain.kernels.linear_loss.reference import linear_loss_reference, token_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = list(Divergence)

# K draft steps, N = T tokens, D model width, V vocabulary.
WIDTH = 8
# fp32 sums over V terms of size at most 1, plus exp of logits of size about 10: a few hundred ulps.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def several_blocks_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 256)
    monkeypatch.setattr(kernel, "CHUNK_ROWS", 3)


def random_inputs(steps: int, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(steps * tokens + vocabulary)
    teacher_TD = torch.randn(tokens, WIDTH, generator=generator)
    student_KTD = teacher_TD + torch.randn(steps, tokens, WIDTH, generator=generator)
    weight_VD = torch.randn(vocabulary, WIDTH, generator=generator)
    target_T = torch.randint(vocabulary, (tokens,), generator=generator)
    student_KTD, teacher_TD, weight_VD = (x.to(DEVICE, dtype) for x in (student_KTD, teacher_TD, weight_VD))
    return student_KTD.requires_grad_(), teacher_TD, weight_VD, target_T.to(DEVICE)


def grad_of(loss_KT: Tensor, student_KTD: Tensor) -> Tensor:
    # Unequal upstream gradients: a backward that ignores them must fail.
    upstream_KT = torch.linspace(-1, 2, loss_KT.numel(), device=DEVICE).view_as(loss_KT)
    return torch.autograd.grad(loss_KT, student_KTD, upstream_KT.to(loss_KT.dtype))[0]


def assert_matches(actual: LinearLoss, expected: LinearLoss) -> None:
    for number in (0, 1, 3):
        torch.testing.assert_close(actual[number], expected[number], **TOLERANCE)
    assert torch.equal(actual.top1_match_KT, expected.top1_match_KT)


@pytest.mark.parametrize(("steps", "tokens", "vocabulary"), [(1, 1, 17), (2, 5, 600)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_equal_the_reference(
    divergence: Divergence, temperature: float, steps: int, tokens: int, vocabulary: int
) -> None:
    inputs = random_inputs(steps, tokens, vocabulary)
    mask_KT = (torch.arange(steps * tokens, device=DEVICE) % 5 != 3).view(steps, tokens)
    settings = {"divergence": divergence, "temperature": temperature, "mask_KT": mask_KT}
    actual = linear_loss_in_chunks(kernel.TritonRows, *inputs, **settings)
    expected = linear_loss_reference(*inputs, **settings)
    assert_matches(actual, expected)
    torch.testing.assert_close(grad_of(actual.loss_KT, inputs[0]), grad_of(expected.loss_KT, inputs[0]), **TOLERANCE)


def test_many_rows_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_ROWS", 40)
    inputs = random_inputs(1, 63, 129)
    actual = linear_loss_in_chunks(kernel.TritonRows, *inputs, divergence=Divergence.kl)
    expected = linear_loss_reference(*inputs, divergence=Divergence.kl)
    assert_matches(actual, expected)
    torch.testing.assert_close(grad_of(actual.loss_KT, inputs[0]), grad_of(expected.loss_KT, inputs[0]), **TOLERANCE)


def rows_of(
    student_NV: Tensor, teacher_NV: Tensor, divergence: Divergence, out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return loss, alpha, top1_match, entropy and dloss/dz of logits, the last in a buffer initialised with NaN."""
    target_N = torch.arange(len(student_NV), device=DEVICE)
    statistics, top_N, entropy_N = kernel.teacher_rows(teacher_NV, 1.0)
    dlogits_NV = torch.full_like(student_NV, torch.nan, dtype=out_dtype)
    results = kernel.student_rows(student_NV, teacher_NV, statistics, top_N, target_N, dlogits_NV, divergence, 1.0)
    return *results, entropy_N, dlogits_NV


def definition_of(student_NV: Tensor, teacher_NV: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return loss and dloss/dz in float64."""
    z_NV = student_NV.double().requires_grad_()
    target_N = torch.arange(len(student_NV), device=DEVICE)
    loss_N = token_loss_reference(z_NV, teacher_NV.double(), target_N, divergence, 1.0)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), z_NV)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bf16_gradient_is_within_one_step_of_the_fp32_one(divergence: Divergence) -> None:
    student_NV, teacher_NV = (3 * torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    *_, rounded_NV = rows_of(student_NV, teacher_NV, divergence, torch.bfloat16)
    *_, exact_NV = rows_of(student_NV, teacher_NV, divergence, torch.float32)
    # The interpreter cuts the mantissa off after 8 bits, where a GPU rounds to nearest.
    torch.testing.assert_close(rounded_NV.float(), exact_NV, rtol=2**-7, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_may_replace_the_logits(divergence: Divergence) -> None:
    student_NV, teacher_NV = (3 * torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    *apart, dlogits_NV = rows_of(student_NV, teacher_NV, divergence, torch.float32)
    statistics, top_N, _ = kernel.teacher_rows(teacher_NV, 1.0)
    target_N = torch.arange(3, device=DEVICE)
    within = kernel.student_rows(student_NV, teacher_NV, statistics, top_N, target_N, student_NV, divergence, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(apart, within, strict=False))
    assert torch.equal(student_NV, dlogits_NV)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_near_a_thousand_lose_nothing(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(2)
    teacher_NV = 1000 + 5 * torch.randn(3, 300, generator=generator)
    student_NV = (teacher_NV + torch.randn(3, 300, generator=generator)).to(DEVICE)
    teacher_NV = teacher_NV.to(DEVICE)
    loss_N, _, _, _, dlogits_NV = rows_of(student_NV, teacher_NV, divergence, torch.float32)
    expected_N, grad_NV = definition_of(student_NV, teacher_NV, divergence)
    torch.testing.assert_close(loss_N.double(), expected_N, **TOLERANCE)
    torch.testing.assert_close(dlogits_NV.double(), grad_NV, **TOLERANCE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_impossible_for_both_contribute_nothing(divergence: Divergence) -> None:
    # The first block and a stretch of the second are impossible: sums must start late and go on after a gap.
    keep_V = torch.ones(700, dtype=torch.bool)
    keep_V[:300] = keep_V[400:420] = False
    student_NV, teacher_NV = (3 * torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    banned = [x.masked_fill(~keep_V.to(DEVICE), -torch.inf) for x in (student_NV, teacher_NV)]
    loss_N, alpha_N, top1_match_N, entropy_N, dlogits_NV = rows_of(*banned, divergence, torch.float32)
    short = [x[:, keep_V.to(DEVICE)].contiguous() for x in banned]
    if divergence is Divergence.ce:  # its targets are the first tokens, which are banned here
        assert (loss_N == torch.inf).all()
        return
    short_loss_N, short_alpha_N, short_match_N, short_entropy_N, short_NV = rows_of(*short, divergence, torch.float32)
    for actual, wanted in ((loss_N, short_loss_N), (alpha_N, short_alpha_N), (entropy_N, short_entropy_N)):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    assert torch.equal(top1_match_N, short_match_N)
    assert (dlogits_NV[:, ~keep_V.to(DEVICE)] == 0).all()
    torch.testing.assert_close(dlogits_NV[:, keep_V.to(DEVICE)], short_NV, **TOLERANCE)


def test_of_equal_logits_the_first_is_the_top_one() -> None:
    teacher_NV = torch.zeros(3, 700, device=DEVICE)
    teacher_NV[0, [3, 600]] = 1.0  # in two blocks
    teacher_NV[1, [301, 302]] = 1.0  # in one
    assert kernel.teacher_rows(teacher_NV, 1.0)[1].tolist() == [3, 301, 0]


def test_bf16_states_are_computed_in_fp32() -> None:
    if DEVICE == "cpu":
        pytest.skip("products of bf16 that accumulate in fp32 exist on a GPU only")
    student_KTD, *rest = random_inputs(2, 63, 1031, torch.bfloat16)
    actual = linear_loss_in_chunks(kernel.TritonRows, student_KTD, *rest, divergence=Divergence.kl)
    exact_KTD = student_KTD.detach().float().requires_grad_()
    floats = [x.float() if x.is_floating_point() else x for x in rest]
    expected = linear_loss_reference(exact_KTD, *floats, divergence=Divergence.kl)
    assert_matches(actual, expected)
    # dloss/dz, the unit gradient and the product with the upstream are each rounded to bf16.
    torch.testing.assert_close(
        grad_of(actual.loss_KT, student_KTD).float(), grad_of(expected.loss_KT, exact_KTD), rtol=3 * 2**-8, atol=1e-2
    )
