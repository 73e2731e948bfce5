"""The Triton functions of `acceptance` themselves: compiled where a GPU is, interpreted elsewhere."""

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.acceptance import Stream, Verification, kernel, policy_kernel
from mtptrain.kernels.acceptance.draws import uniforms_reference
from mtptrain.kernels.acceptance.draws_kernel import uniforms_triton
from mtptrain.kernels.acceptance.policy_kernel import policy_probabilities_triton
from mtptrain.kernels.acceptance.reference import (
    policy_probabilities_reference,
    sample_tokens_reference,
    verify_draft_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, N draws.


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 128)
    monkeypatch.setattr(policy_kernel, "BLOCK", 128)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def random_draws(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)


def random_case(rows: int, steps: int, vocabulary: int) -> list[Tensor]:
    """Draft, q, p and draws: close enough to be kept and dropped; some rows drafted shorter, some with q = p."""
    logits_BLV = random_logits(rows, steps + 1, vocabulary)
    p_BLV = policy_probabilities_reference(logits_BLV, 0.7, top_k=50)
    q_BKV = policy_probabilities_reference(logits_BLV[:, :steps] + 0.3 * random_logits(rows, steps, vocabulary), 0.7)
    q_BKV[::4] = p_BLV[::4, :steps]
    u_BK = random_draws(rows, steps)
    draft_BK = sample_tokens_reference(q_BKV.flatten(0, 1), u_BK.flatten()).view(rows, steps)
    q_BKV[1::4, steps // 2 :] = 0
    return [draft_BK, q_BKV, p_BLV, random_draws(rows, steps + 1).flip(0)]


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize(("rows", "num_draws"), [(1, 1), (63, 5), (3, 129), (3, 0), (0, 4)])
def test_draws_equal_the_reference_bit_by_bit(rows: int, num_draws: int, stream: Stream) -> None:
    generator = torch.Generator().manual_seed(rows)
    seed_B = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    position_B = torch.randint(2**40, (rows,), generator=generator)
    found_BN = uniforms_triton(seed_B.to(DEVICE), position_B.to(DEVICE), stream, num_draws)
    assert torch.equal(found_BN.cpu(), uniforms_reference(seed_B, position_B, stream, num_draws))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 63, 300])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0, None, 1.0), (0.7, None, 1.0), (1.3, 7, 1.0), (0.7, None, 0.9), (1.0, 9, 0.6)],
)
def test_a_policy_gives_the_probabilities_of_the_reference(
    temperature: float, top_k: int | None, top_p: float, vocabulary: int, dtype: torch.dtype
) -> None:
    logits_BKV = random_logits(1, 2, vocabulary, dtype=dtype)
    found_BKV = policy_probabilities_triton(logits_BKV, temperature, top_k, top_p)
    expected_BKV = policy_probabilities_reference(logits_BKV, temperature, top_k, top_p)
    assert torch.equal(found_BKV > 0, expected_BKV > 0)
    # exp at arguments of size about 20, and sums in another order: some ulps of fp32.
    torch.testing.assert_close(found_BKV, expected_BKV, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (None, 6.5 / 300), (290, 6.5 / 290)])
def test_of_many_equals_the_lowest_ids_are_kept(top_k: int | None, top_p: float) -> None:
    p_BV = policy_probabilities_triton(torch.zeros(1, 300, device=DEVICE), 1.0, top_k, top_p)
    assert p_BV.nonzero()[:, 1].tolist() == list(range(7))


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_shares_among_equals(temperature: float) -> None:
    logits_BV = torch.zeros(1, 300, device=DEVICE)
    logits_BV[0, [5, 200]] = 1000.0
    p_BV = policy_probabilities_triton(logits_BV, temperature)
    assert p_BV.nonzero()[:, 1].tolist() == [5, 200]
    assert p_BV[0, 5] == 0.5


def test_impossible_tokens_stay_impossible_and_the_lowest_of_equals_wins() -> None:
    logits_BV = torch.full((1, 300), -torch.inf, device=DEVICE)
    logits_BV[0, [140, 260]] = 2.0
    assert policy_probabilities_triton(logits_BV, 0.5, 9, 0.999).nonzero()[:, 1].tolist() == [140, 260]
    assert policy_probabilities_triton(logits_BV, 0).nonzero()[:, 1].tolist() == [140]


@pytest.mark.parametrize(("rows", "steps", "vocabulary"), [(1, 0, 5), (9, 1, 63), (10, 3, 300), (3, 8, 129)])
@pytest.mark.parametrize("verification", list(Verification))
def test_verification_equals_the_reference_bit_by_bit(
    verification: Verification, rows: int, steps: int, vocabulary: int
) -> None:
    case = random_case(rows, steps, vocabulary)
    found = kernel.verify_draft_triton(*case, verification)
    expected = verify_draft_reference(*case, verification)
    assert torch.equal(found.accepted_B, expected.accepted_B)
    assert torch.equal(found.token_B, expected.token_B)
    if rows == 10:  # the case is worth something: some drafts are kept, some are not
        assert 0 < float(found.accepted_B.float().mean()) < steps


@pytest.mark.parametrize("verification", list(Verification))
def test_no_block_size_changes_a_token(verification: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(5, 2, 300)
    found = kernel.verify_draft_triton(*case, verification)
    monkeypatch.setattr(kernel, "BLOCK", 512)
    assert all(map(torch.equal, found, kernel.verify_draft_triton(*case, verification)))


def test_a_residual_of_nothing_falls_back_to_the_target() -> None:
    """The target is its own draft, and the only token that it allows is not the drafted one."""
    p_BLV = torch.zeros(2, 2, 300, device=DEVICE)
    p_BLV[:, :, 200] = 1
    draft_BK = torch.full((2, 1), 7, device=DEVICE)
    found = kernel.verify_draft_triton(draft_BK, p_BLV[:, :1], p_BLV, random_draws(2, 2), Verification.token)
    assert found.accepted_B.tolist() == [0, 0]
    assert found.token_B.tolist() == [200, 200]


@pytest.mark.parametrize("vocabulary", [1, 63, 300])
def test_sampled_tokens_equal_the_reference_bit_by_bit(vocabulary: int) -> None:
    weight_BV = random_logits(31, vocabulary).relu()
    weight_BV[:, vocabulary // 2] += 1e-3
    u_B = random_draws(31)
    u_B[:2] = torch.tensor([0, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    found_B = kernel.sample_tokens_triton(weight_BV, u_B)
    assert torch.equal(found_B, sample_tokens_reference(weight_BV, u_B))
    assert (weight_BV.gather(1, found_B[:, None]) > 0).all()
