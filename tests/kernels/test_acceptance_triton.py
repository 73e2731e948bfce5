"""The Triton functions of `acceptance`: compiled on a GPU, interpreted elsewhere."""

from functools import cached_property

import pytest
import torch
from torch import Tensor

from mtptrain.kernels.acceptance import DrawKind, Sampling, Verification, kernel
from mtptrain.kernels.acceptance.draws import uniforms_reference
from mtptrain.kernels.acceptance.draws_kernel import uniforms_triton
from mtptrain.kernels.acceptance.kernel import policy_probabilities_triton, top_tokens_triton, verify_logits_triton
from mtptrain.kernels.acceptance.reference import (
    Emission,
    policy_probabilities_reference,
    sample_tokens_reference,
    top_tokens_reference,
    verify_draft_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("_poisoned_memory")

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary, N draws.


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 128)
    monkeypatch.setattr(kernel, "VERIFY_BLOCK", 64)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def random_draws(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)


class Case:
    """Draft and target close enough for both outcomes; some rows have shorter drafts, some have q = p."""

    def __init__(self, rows: int, steps: int, vocabulary: int, sampling: Sampling, is_certain: bool = False) -> None:
        self.sampling, self.u_BL = sampling, random_draws(rows, steps + 1).flip(0)
        self.logits_BLV = random_logits(rows, steps + 1, vocabulary)
        draft_logits_BKV = self.logits_BLV[:, :steps] + 0.4 * random_logits(rows, steps, vocabulary)
        draft_logits_BKV[::4] = self.logits_BLV[::4, :steps]
        q_BKV = policy_probabilities_triton(draft_logits_BKV, sampling)
        u_R = random_draws(rows * steps)
        self.draft_BK = sample_tokens_reference(q_BKV.flatten(0, 1), u_R).view(rows, steps)
        self.drafted_B = torch.full_like(self.draft_BK[:, :1].sum(1), steps)
        self.drafted_B[1::4] = steps // 2
        self.draft_logits_BKV = None if is_certain else draft_logits_BKV
        if is_certain:
            q_BKV = torch.zeros_like(q_BKV).scatter_(-1, self.draft_BK.unsqueeze(-1), 1.0)
        counts_BK1 = torch.arange(steps, device=DEVICE) < self.drafted_B[:, None]
        self.q_BKV = q_BKV * counts_BK1.unsqueeze(-1)
        if steps and not is_certain:  # logits beyond the count are not read
            draft_logits_BKV[~counts_BK1] = 1e30

    @cached_property
    def p_BLV(self) -> Tensor:
        """The kernel's probabilities of the target."""
        return policy_probabilities_triton(self.logits_BLV, self.sampling)

    def verify(self, verification: Verification) -> Emission:
        draft = (self.draft_BK, self.drafted_B, self.draft_logits_BKV)
        return verify_logits_triton(*draft, self.logits_BLV, self.u_BL, self.sampling, verification)

    def check(self, verification: Verification) -> Tensor:
        """Compare with the definition on the kernel's probabilities, and return the kept lengths."""
        actual, p_BLV = self.verify(verification), self.p_BLV
        expected = verify_draft_reference(self.draft_BK, self.q_BKV, p_BLV, self.u_BL, verification)
        assert torch.equal(actual.accepted_B, expected.accepted_B)
        assert torch.equal(actual.gap_BL, top_tokens_reference(self.logits_BLV)[1])
        for row, kept in enumerate(actual.accepted_B.tolist()):
            emitted = [*self.draft_BK[row, :kept].tolist(), int(expected.token_B[row])]
            assert actual.tokens_BL[row, : kept + 1].tolist() == emitted
            assert actual.probability_BL[row, : kept + 1].tolist() == p_BLV[row, range(kept + 1), emitted].tolist()
        assert ((actual.tokens_BL >= 0) & (actual.tokens_BL < p_BLV.shape[-1])).all()
        return actual.accepted_B


@pytest.mark.parametrize("kind", list(DrawKind))
@pytest.mark.parametrize(("rows", "num_draws"), [(1, 1), (63, 5), (3, 129), (3, 0), (0, 4)])
def test_draws_equal_the_reference_bit_by_bit(rows: int, num_draws: int, kind: DrawKind) -> None:
    generator = torch.Generator().manual_seed(rows)
    seed_B = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    position_B = torch.randint(2**40, (rows,), generator=generator)
    actual_BN = uniforms_triton(seed_B.to(DEVICE), position_B.to(DEVICE), kind, num_draws)
    assert torch.equal(actual_BN.cpu(), uniforms_reference(seed_B, position_B, kind, num_draws))


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(1, torch.float32), (63, torch.bfloat16), (300, torch.float32), (300, torch.bfloat16)]
)
@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.3, 4), Sampling(0.7, None, 0.9), Sampling(1.0, 9, 0.6), Sampling(1.0, 290)]
)
def test_a_policy_gives_the_probabilities_of_the_reference(
    sampling: Sampling, vocabulary: int, dtype: torch.dtype
) -> None:
    logits_BKV = random_logits(1, 2, vocabulary, dtype=dtype)
    actual_BKV = policy_probabilities_triton(logits_BKV, sampling)
    expected_BKV = policy_probabilities_reference(logits_BKV, sampling)
    assert torch.equal(actual_BKV > 0, expected_BKV > 0)
    # exp at arguments of size about 20, and sums in another order: some ulps of fp32.
    torch.testing.assert_close(actual_BKV, expected_BKV, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (None, 6.5 / 300), (290, 6.5 / 290), (2, 0.5), (7, 1 - 2**-24)]
)
def test_of_many_equals_the_lowest_ids_are_kept(top_k: int | None, top_p: float) -> None:
    p_BV = policy_probabilities_triton(torch.zeros(1, 300, device=DEVICE), Sampling(1.0, top_k, top_p))
    expected_BV = policy_probabilities_reference(torch.zeros(1, 300, device=DEVICE), Sampling(1.0, top_k, top_p))
    assert torch.equal(p_BV > 0, expected_BV > 0)


def test_ties_at_the_edge_are_broken_by_their_ids() -> None:
    """Two tokens above, five equal ones of which three are kept, in three blocks and not in the order of ids."""
    logits_BV = torch.zeros(1, 300, device=DEVICE)
    logits_BV[0, [250, 10]] = 9.0
    logits_BV[0, [5, 40, 130, 200, 299]] = 7.0
    for sampling in (Sampling(1.0, 5), Sampling(1.0, 5, 1 - 1e-6)):
        kept = policy_probabilities_triton(logits_BV, sampling).nonzero()[:, 1].tolist()
        assert kept == [5, 10, 40, 130, 250]


def test_a_flat_distribution_has_more_candidates_than_its_bound_lets_through() -> None:
    """No token reaches the bound of top-p when the softmax's sum rounds below it: then all are candidates."""
    logits_BV = 1e-3 * random_logits(1, 300)
    sampling = Sampling(1.0, None, 1 - 2**-26)
    actual_BV, expected_BV = policy_probabilities_triton(logits_BV, sampling), logits_BV.softmax(-1)
    torch.testing.assert_close(actual_BV, expected_BV, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_shares_among_equals(temperature: float) -> None:
    logits_BV = torch.zeros(1, 300, device=DEVICE)
    logits_BV[0, [5, 200]] = 1000.0
    p_BV = policy_probabilities_triton(logits_BV, Sampling(temperature))
    assert p_BV.nonzero()[:, 1].tolist() == [5, 200]
    assert p_BV[0, 5] == 0.5


def test_impossible_tokens_stay_impossible_and_the_lowest_of_equals_wins() -> None:
    logits_BV = torch.full((1, 300), -torch.inf, device=DEVICE)
    logits_BV[0, [140, 260]] = 2.0
    assert policy_probabilities_triton(logits_BV, Sampling(0.5, 9, 0.999)).nonzero()[:, 1].tolist() == [140, 260]
    top_BL, gap_BL = top_tokens_triton(logits_BV[:, None])
    assert (top_BL.item(), gap_BL.item()) == (140, 0)


@pytest.mark.parametrize("vocabulary", [1, 63, 300])
def test_the_likeliest_tokens_equal_the_reference(vocabulary: int) -> None:
    logits_BLV = random_logits(3, 2, vocabulary, dtype=torch.bfloat16)  # with ties
    assert all(map(torch.equal, top_tokens_triton(logits_BLV), top_tokens_reference(logits_BLV)))


@pytest.mark.parametrize(("rows", "steps", "vocabulary"), [(1, 0, 5), (9, 1, 63), (6, 3, 140), (2, 8, 129)])
@pytest.mark.parametrize("verification", list(Verification))
def test_verification_equals_the_reference_bit_by_bit(
    verification: Verification, rows: int, steps: int, vocabulary: int
) -> None:
    accepted_B = Case(rows, steps, vocabulary, Sampling(0.7)).check(verification)
    if rows == 6:  # the case covers both outcomes: some drafts are kept, some are not
        assert 0 < float(accepted_B.float().mean()) < steps


@pytest.mark.parametrize("verification", list(Verification))
def test_the_token_after_a_rejection_is_drawn_from_the_residual(verification: Verification) -> None:
    case = Case(16, 1, 140, Sampling(2.0))
    case.u_BL[:, 0] = 1 - 2**-53
    assert case.check(verification).sum() < 8


def test_cut_distributions_are_verified_like_whole_ones() -> None:
    case = Case(2, 1, 140, Sampling(0.9, 12, 0.9))
    for verification in Verification:
        case.check(verification)


def test_certain_drafts_need_no_logits() -> None:
    case = Case(9, 2, 140, Sampling(0.7), is_certain=True)
    for verification in Verification:
        case.check(verification)


def test_a_residual_of_nothing_falls_back_to_the_target() -> None:
    """The target is its own draft, and the only token that it allows is not the drafted one."""
    case = Case(2, 1, 300, Sampling(1.0))
    case.logits_BLV[:] = -torch.inf
    case.logits_BLV[:, :, 200] = 0
    case.draft_logits_BKV, case.draft_BK[:], case.drafted_B[:] = case.logits_BLV[:, :1], 7, 1
    actual = case.verify(Verification.token)
    assert actual.accepted_B.tolist() == [0, 0]
    assert actual.tokens_BL[:, 0].tolist() == [200, 200]


def test_the_first_and_the_last_draw_give_possible_tokens() -> None:
    case = Case(3, 0, 300, Sampling(1.0))
    case.logits_BLV[:, :, [0, 1, 297, 298, 299]] = -torch.inf
    case.u_BL[:, 0] = torch.tensor([0, 1 - 2**-53, 0.5], dtype=torch.float64, device=DEVICE)
    case.check(Verification.token)
    assert (case.verify(Verification.token).probability_BL > 0).all()
