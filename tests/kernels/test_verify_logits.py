"""Verification from logits equals that of their distributions; also the numbers that a decoding loop records."""

import pytest
import torch

from mtptrain.kernels.acceptance import Sampling, Verification, policy_probabilities, verify_logits
from mtptrain.kernels.acceptance.reference import sample_tokens_reference, verify_draft_reference

# B rows, K drafted tokens, L = K + 1 verified positions, V vocabulary.
LOGITS = [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 1]), torch.zeros(2, 3, 5), torch.zeros(2, 4, 5)]
DRAWS = torch.zeros(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("verification", list(Verification))
@pytest.mark.parametrize("is_certain", [False, True])
def test_logits_are_verified_as_their_distributions(verification: Verification, is_certain: bool) -> None:
    sampling, generator = Sampling(0.8, 9, 0.9), torch.Generator().manual_seed(3)
    logits_BLV = 2 * torch.randn(63, 4, 17, generator=generator)
    draft_logits_BKV = logits_BLV[:, :3] + torch.randn(63, 3, 17, generator=generator)
    u_BL, drafted_B = torch.rand(63, 4, generator=generator, dtype=torch.float64), torch.arange(63) % 4
    q_BKV, p_BLV = (policy_probabilities(x, sampling) for x in (draft_logits_BKV, logits_BLV))
    draft_BK = draft_logits_BKV.argmax(-1)
    if is_certain:
        q_BKV = torch.nn.functional.one_hot(draft_BK, 17).float()
    else:
        draft_BK = sample_tokens_reference(q_BKV.flatten(0, 1), u_BL.flip(0)[:, :3].flatten()).view(63, 3)
    q_BKV *= (torch.arange(3) < drafted_B[:, None])[..., None]
    expected = verify_draft_reference(draft_BK, q_BKV, p_BLV, u_BL, verification)
    logits = None if is_certain else draft_logits_BKV
    actual = verify_logits(draft_BK, drafted_B, logits, logits_BLV, u_BL, sampling, verification)
    assert torch.equal(actual.accepted_B, expected.accepted_B)
    assert 0 < int(actual.accepted_B.sum()) < int(drafted_B.sum())
    for row, kept in enumerate(actual.accepted_B.tolist()):
        emitted = [*draft_BK[row, :kept].tolist(), int(expected.token_B[row])]
        assert actual.tokens_BL[row, : kept + 1].tolist() == emitted
        assert actual.probability_BL[row, : kept + 1].tolist() == p_BLV[row, range(kept + 1), emitted].tolist()
    largest_BL2 = logits_BLV.sort(-1).values[..., -2:]
    assert torch.equal(actual.gap_BL, largest_BL2[..., 1] - largest_BL2[..., 0])


def test_at_temperature_0_nothing_is_drawn() -> None:
    logits_BLV = torch.randn(63, 4, 5, generator=torch.Generator().manual_seed(4))
    draft_BK, drafted_B = logits_BLV[:, :3].argmax(-1), torch.arange(63) % 4
    draft_BK[:, 2] += 1
    actual = verify_logits(draft_BK % 5, drafted_B, None, logits_BLV, None, Sampling(0))
    assert torch.equal(actual.accepted_B, drafted_B.clamp(max=2))
    assert torch.equal(actual.tokens_BL, logits_BLV.argmax(-1))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({0: torch.zeros(2, 3)}, "draft_BK must be"),
        ({1: torch.tensor([3])}, "drafted_B must be"),
        ({2: torch.ones(2, 2, 5)}, "one row for each drafted token"),
        ({2: torch.ones(2, 3, 5).double()}, "dtype of the target's"),
        ({3: torch.ones(2, 4, 5, dtype=torch.int64)}, "must be floating"),
        ({3: torch.ones(2, 3, 5)}, "one position more"),
        ({4: torch.rand(2, 4)}, "draws are"),
        ({4: None}, "temperature=0.5 needs draws"),
        ({5: Sampling(0.5, 0)}, "top_k=0"),
    ],
)
def test_unfit_inputs_are_refused(replaced: dict[int, object], message: str) -> None:
    case = [*LOGITS, DRAWS, Sampling(0.5)]
    with pytest.raises(ValueError, match=message):
        verify_logits(*(replaced.get(index, x) for index, x in enumerate(case)))  # type: ignore[arg-type]
