import pytest
import torch
from torch import Tensor

from mtptrain.kernels.linear_loss import Divergence, LinearLoss, linear_loss
from mtptrain.kernels.linear_loss.reference import linear_loss_reference, token_loss_reference
from mtptrain.kernels.linear_loss.rows import row_argmax

# K draft steps, T tokens, D model width, V vocabulary.
WIDTH = 8
SIZES = [(1, 1, 17), (3, 63, 17), (3, 129, 1031), (1, 129, 256)]  # 129 is two chunks, 256 takes the blockwise argmax
# fp32 sums over V terms of size at most 1, plus exp of logits of size about 10: a few hundred ulps.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def chunks_of_128_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtptrain.kernels.linear_loss.rows.CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("mtptrain.kernels.linear_loss.rows.MIN_CHUNK_ROWS", 128)


def random_inputs(
    steps: int, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps * tokens + vocabulary)
    teacher_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    student_KTD = teacher_TD + torch.randn(steps, tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)
    target_T = torch.randint(vocabulary, (tokens,), generator=generator)
    return student_KTD.to(dtype).requires_grad_(), teacher_TD.to(dtype), weight_VD.to(dtype), target_T


def prefix_mask(steps: int, tokens: int) -> Tensor:
    """Return a mask in which step k loses its last 2k + 1 rows and every fifth one."""
    row_T = torch.arange(tokens)
    return torch.stack([(row_T < tokens - 2 * k - 1) & (row_T % 5 != 3) for k in range(steps)])


def grad_of(outputs: LinearLoss, student_KTD: Tensor) -> Tensor:
    # Unequal upstream gradients: a backward that ignores them must fail.
    upstream_KT = torch.linspace(-1, 2, outputs.loss_KT.numel()).view_as(outputs.loss_KT)
    return torch.autograd.grad(outputs.loss_KT, student_KTD, upstream_KT.to(outputs.loss_KT.dtype))[0]


def assert_matches(actual: LinearLoss, expected: LinearLoss, **tolerance: float) -> None:
    torch.testing.assert_close(actual.loss_KT, expected.loss_KT, **tolerance)
    torch.testing.assert_close(actual.alpha_KT, expected.alpha_KT, **tolerance)
    torch.testing.assert_close(actual.entropy_T, expected.entropy_T, **tolerance)
    assert torch.equal(actual.top1_match_KT, expected.top1_match_KT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("steps", "tokens", "vocabulary"), SIZES)
@pytest.mark.parametrize("divergence", list(Divergence))
def test_chunked_values_and_gradients_equal_the_reference(
    divergence: Divergence, steps: int, tokens: int, vocabulary: int, temperature: float, masked: bool
) -> None:
    inputs = random_inputs(steps, tokens, vocabulary)
    mask_KT = prefix_mask(steps, tokens) if masked else None
    actual, expected = (
        f(*inputs, divergence=divergence, temperature=temperature, mask_KT=mask_KT)
        for f in (linear_loss, linear_loss_reference)
    )
    assert_matches(actual, expected, **TOLERANCE)
    torch.testing.assert_close(grad_of(actual, inputs[0]), grad_of(expected, inputs[0]), **TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", list(Divergence))
def test_chunked_gradient_equals_finite_differences_in_float64(divergence: Divergence, temperature: float) -> None:
    student_KTD, *rest = random_inputs(2, 3, 17, torch.float64)

    def loss(student_KTD: Tensor) -> Tensor:
        return linear_loss(student_KTD, *rest, divergence=divergence, temperature=temperature).loss_KT

    if divergence is Divergence.hybrid:  # finite differences see through the stop-gradient of its mixing weight
        expected = linear_loss_reference(student_KTD, *rest, divergence=divergence, temperature=temperature)
        actual = linear_loss(student_KTD, *rest, divergence=divergence, temperature=temperature)
        torch.testing.assert_close(grad_of(actual, student_KTD), grad_of(expected, student_KTD))
    else:
        assert torch.autograd.gradcheck(loss, student_KTD)


@pytest.mark.parametrize("divergence", [d for d in Divergence if d is not Divergence.hybrid])
def test_reference_gradient_equals_finite_differences_in_float64(divergence: Divergence) -> None:
    student_KTV, teacher_TV, *_ = random_inputs(2, 3, 17, torch.float64)  # hidden states of 8 serve as logits of 8
    target_KT = torch.arange(6).view(2, 3)
    assert torch.autograd.gradcheck(
        lambda z: token_loss_reference(z, teacher_TV, target_KT, divergence, 2.5), student_KTV
    )


def test_hybrid_gradient_is_the_fixed_mix_of_kl_and_tv_gradients() -> None:
    inputs = random_inputs(2, 5, 17, torch.float64)
    kl, tv, hybrid = (
        linear_loss_reference(*inputs, divergence=d, temperature=2.5)
        for d in (Divergence.kl, Divergence.tv, Divergence.hybrid)
    )
    mix_KT = torch.exp(-3 * (1 - tv.loss_KT.detach()))
    torch.testing.assert_close(hybrid.loss_KT, mix_KT * kl.loss_KT + (1 - mix_KT) * tv.loss_KT)
    expected = torch.autograd.grad((mix_KT * kl.loss_KT + (1 - mix_KT) * tv.loss_KT).sum(), inputs[0])[0]
    torch.testing.assert_close(torch.autograd.grad(hybrid.loss_KT.sum(), inputs[0])[0], expected)


def tiny_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states that an identity head turns into log-probabilities: p = (.5, .3, .2), q = (.2, .6, .2)."""
    teacher_TD = torch.tensor([[0.5, 0.3, 0.2]]).log()
    student_KTD = torch.tensor([[[0.2, 0.6, 0.2]]]).log().requires_grad_()
    return student_KTD, teacher_TD, torch.eye(3), torch.tensor([1])


@pytest.mark.parametrize("op", [linear_loss, linear_loss_reference])
@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # Worked by hand from p and q of tiny_case.
        (Divergence.ce, 0.510826),  # -log .6
        (Divergence.kl, 0.250201),  # .5 log 2.5 + .3 log .5
        (Divergence.reverse_kl, 0.232630),  # .2 log .4 + .6 log 2
        (Divergence.jsd, 0.058692),  # m = (.35, .45, .2)
        (Divergence.tv, 0.3),
        (Divergence.neg_log_alpha, 0.356675),  # -log .7
        (Divergence.hybrid, 0.293902),  # lambda = exp(-2.1) = .122456
    ],
)
def test_outputs_of_a_tiny_case_equal_the_hand_computed_ones(op, divergence: Divergence, expected: float) -> None:  # noqa: ANN001
    outputs = op(*tiny_case(), divergence=divergence)
    assert outputs.loss_KT.item() == pytest.approx(expected, abs=2e-6)
    assert outputs.alpha_KT.item() == pytest.approx(0.7, abs=1e-6)  # .2 + .3 + .2
    assert outputs.entropy_T.item() == pytest.approx(1.029653, abs=1e-6)
    assert outputs.top1_match_KT.tolist() == [[False]]


@pytest.mark.parametrize("divergence", list(Divergence))
def test_alpha_match_and_entropy_ignore_the_temperature_of_the_loss(divergence: Divergence) -> None:
    inputs = random_inputs(3, 63, 17)
    plain, tempered = (linear_loss(*inputs, divergence=divergence, temperature=t) for t in (1.0, 2.5))
    assert torch.equal(plain.alpha_KT, tempered.alpha_KT)
    assert torch.equal(plain.top1_match_KT, tempered.top1_match_KT)
    assert torch.equal(plain.entropy_T, tempered.entropy_T)
    assert torch.equal(plain.loss_KT, tempered.loss_KT) == (divergence is Divergence.ce)


@pytest.mark.parametrize("divergence", list(Divergence))
def test_logits_fifty_times_larger_stay_finite(divergence: Divergence) -> None:
    student_KTD, teacher_TD, weight_VD, target_T = random_inputs(3, 63, 1031)
    inputs = student_KTD, teacher_TD, 50 * weight_VD, target_T
    actual, expected = (f(*inputs, divergence=divergence) for f in (linear_loss, linear_loss_reference))
    grad_KTD = grad_of(actual, student_KTD)
    assert all(x.isfinite().all() for x in (actual.loss_KT, actual.alpha_KT, actual.entropy_T, grad_KTD))
    # Logits near 1000 carry an error of 6e-5 each, and exp turns it into a relative one.
    torch.testing.assert_close(actual.loss_KT, expected.loss_KT, rtol=1e-3, atol=1e-3)
    # Entries of the scaled head reach 150, so a gradient is a sum of terms that large.
    torch.testing.assert_close(grad_KTD, grad_of(expected, student_KTD), rtol=1e-3, atol=150 * 1e-3)


@pytest.mark.parametrize("divergence", list(Divergence))
def test_masked_rows_leak_nothing(divergence: Divergence) -> None:
    student_KTD, teacher_TD, weight_VD, target_T = random_inputs(3, 129, 17)
    mask_KT = prefix_mask(3, 129)
    dead_T = ~mask_KT.any(0)
    dirty_KTD = student_KTD.detach().masked_fill(~mask_KT[..., None], torch.nan).requires_grad_()
    dirty = dirty_KTD, teacher_TD.masked_fill(dead_T[:, None], torch.nan), weight_VD, target_T.masked_fill(dead_T, -100)
    clean = linear_loss(student_KTD, teacher_TD, weight_VD, target_T, divergence=divergence)
    clean_grad_KTD = grad_of(clean, student_KTD)
    for op in (linear_loss, linear_loss_reference):
        outputs = op(*dirty, divergence=divergence, mask_KT=mask_KT)
        grad_KTD = grad_of(outputs, dirty_KTD)
        assert (outputs.loss_KT[~mask_KT] == 0).all()
        assert (outputs.alpha_KT[~mask_KT] == 0).all()
        assert not outputs.top1_match_KT[~mask_KT].any()
        assert (outputs.entropy_T[dead_T] == 0).all()
        assert (grad_KTD[~mask_KT] == 0).all()
        torch.testing.assert_close(outputs.loss_KT[mask_KT], clean.loss_KT[mask_KT], **TOLERANCE)
        torch.testing.assert_close(grad_KTD[mask_KT], clean_grad_KTD[mask_KT], **TOLERANCE)


@pytest.mark.parametrize("op", [linear_loss, linear_loss_reference])
def test_a_step_without_a_valid_row_is_all_zero(op) -> None:  # noqa: ANN001
    inputs = random_inputs(3, 63, 17)
    mask_KT = torch.ones(3, 63, dtype=torch.bool)
    mask_KT[1] = False
    outputs = op(*inputs, divergence=Divergence.kl, mask_KT=mask_KT)
    assert outputs.loss_KT.count_nonzero(dim=1).tolist() == [63, 0, 63]
    assert grad_of(outputs, inputs[0])[1].count_nonzero() == 0


@pytest.mark.parametrize("op", [linear_loss, linear_loss_reference])
@pytest.mark.parametrize("divergence", list(Divergence))
def test_no_rows_give_empty_outputs_and_gradient(op, divergence: Divergence) -> None:  # noqa: ANN001
    student_KTD = torch.empty(3, 0, WIDTH, requires_grad=True)
    outputs = op(
        student_KTD, torch.empty(0, WIDTH), torch.randn(17, WIDTH), torch.empty(0).long(), divergence=divergence
    )
    outputs.loss_KT.sum().backward()
    assert [x.shape for x in outputs] == [(3, 0), (3, 0), (3, 0), (0,)]
    assert student_KTD.grad.shape == (3, 0, WIDTH)


@pytest.mark.parametrize("op", [linear_loss, linear_loss_reference])
def test_where_every_row_is_masked_all_is_zero(op) -> None:  # noqa: ANN001
    inputs = random_inputs(2, 5, 256)
    outputs = op(*inputs, divergence=Divergence.kl, mask_KT=torch.zeros(2, 5, dtype=torch.bool))
    assert not any(x.any() for x in (*outputs, grad_of(outputs, inputs[0])))


@pytest.mark.parametrize("divergence", [d for d in Divergence if d is not Divergence.ce])
def test_a_perfect_head_has_no_loss_and_no_gradient(divergence: Divergence) -> None:
    # p = q bit for bit: every token is a tie of the minimum.
    _, teacher_TD, weight_VD, target_T = random_inputs(1, 63, 1031)
    student_KTD = teacher_TD.expand(3, -1, -1).clone().requires_grad_()
    outputs = linear_loss(student_KTD, teacher_TD, weight_VD, target_T, divergence=divergence)
    torch.testing.assert_close(outputs.loss_KT, torch.zeros(3, 63), rtol=0, atol=2e-6)
    torch.testing.assert_close(outputs.alpha_KT, torch.ones(3, 63), rtol=0, atol=2e-6)
    assert outputs.top1_match_KT.all()
    torch.testing.assert_close(grad_of(outputs, student_KTD), torch.zeros(3, 63, WIDTH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [17, 256])
@pytest.mark.parametrize("op", [linear_loss, linear_loss_reference])
def test_tied_logits_match_only_at_the_first_of_the_largest(op, vocabulary: int) -> None:  # noqa: ANN001
    # The student ties tokens 3 and 16; the teacher's best is 3 in row 0 and 16 in row 1.
    student_KTD, teacher_TD = torch.zeros(1, 2, vocabulary), torch.zeros(2, vocabulary)
    student_KTD[..., [3, 16]] = 2.0
    teacher_TD[0, 3] = teacher_TD[1, 16] = 1.0
    outputs = op(student_KTD, teacher_TD, torch.eye(vocabulary), torch.zeros(2).long(), divergence=Divergence.kl)
    assert outputs.top1_match_KT.tolist() == [[True, False]]


@pytest.mark.parametrize("vocabulary", [1, 17, 128, 1024, 1031])
def test_row_argmax_is_the_first_of_equals(vocabulary: int) -> None:
    x_NV = torch.randint(3, (63, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(row_argmax(x_NV), x_NV.argmax(-1))


def test_only_the_loss_carries_a_gradient_and_only_to_the_student() -> None:
    student_KTD, teacher_TD, weight_VD, target_T = random_inputs(3, 63, 17)
    teacher_TD.requires_grad_()
    weight_VD.requires_grad_()
    for op in (linear_loss, linear_loss_reference):
        outputs = op(student_KTD, teacher_TD, weight_VD, target_T, divergence=Divergence.kl)
        assert [x.requires_grad for x in outputs] == [True, False, False, False]
        outputs.loss_KT.sum().backward()
        assert teacher_TD.grad is None
        assert weight_VD.grad is None
        assert student_KTD.grad is not None


def test_without_gradients_the_outputs_are_the_same() -> None:
    inputs = random_inputs(3, 129, 17)
    expected = linear_loss(*inputs, divergence=Divergence.hybrid)
    with torch.no_grad():
        actual = linear_loss(*inputs, divergence=Divergence.hybrid)
    assert not actual.loss_KT.requires_grad
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", list(Divergence))
def test_bf16_inputs_are_computed_in_fp32(divergence: Divergence, temperature: float) -> None:
    student_KTD, teacher_TD, weight_VD, target_T = random_inputs(3, 63, 1031, torch.bfloat16)
    exact_KTD = student_KTD.detach().float().requires_grad_()
    actual = linear_loss(student_KTD, teacher_TD, weight_VD, target_T, divergence=divergence, temperature=temperature)
    exact = linear_loss_reference(
        exact_KTD, teacher_TD.float(), weight_VD.float(), target_T, divergence=divergence, temperature=temperature
    )
    assert_matches(actual, exact, **TOLERANCE)
    # The gradient is rounded to bf16 twice, as unit gradient and as product, by 2^-8 at most each.
    actual_grad, exact_grad = grad_of(actual, student_KTD), grad_of(exact, exact_KTD)
    assert actual_grad.dtype == torch.bfloat16
    torch.testing.assert_close(actual_grad.float(), exact_grad, rtol=2 * 2**-8 + 1e-4, atol=2e-5)


def test_autocast_does_not_lower_the_precision_of_logits() -> None:
    inputs = random_inputs(3, 63, 17)
    expected = linear_loss(*inputs, divergence=Divergence.kl)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_loss(*inputs, divergence=Divergence.kl)
    assert torch.equal(actual.loss_KT, expected.loss_KT)
    assert torch.equal(grad_of(actual, inputs[0]), grad_of(expected, inputs[0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_KTD", torch.zeros(63, WIDTH)),
        ("student_KTD", torch.zeros(0, 63, WIDTH)),
        ("teacher_TD", torch.zeros(62, WIDTH)),
        ("teacher_TD", torch.zeros(63, WIDTH, dtype=torch.bfloat16)),
        ("weight_VD", torch.zeros(WIDTH, 17)),
        ("target_T", torch.zeros(62).long()),
        ("target_T", torch.zeros(63)),
        ("mask_KT", torch.ones(63, 3, dtype=torch.bool)),
        ("mask_KT", torch.ones(3, 63)),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Tensor | float) -> None:
    tensors = zip(("student_KTD", "teacher_TD", "weight_VD", "target_T"), random_inputs(3, 63, 17), strict=True)
    with pytest.raises(ValueError, match=name):
        linear_loss(**{**dict(tensors), "divergence": Divergence.kl, name: value})
