import pytest
import torch

from mtptrain.losses.rollout import chain_loss, step_weights, weighted_loss

# K draft steps, T tokens, A anchors.


def test_step_weights_fall_geometrically_and_sum_to_one() -> None:
    weights_K = step_weights(3, 0.6)
    torch.testing.assert_close(weights_K, torch.tensor([1.0, 0.6, 0.36]) / 1.96)


@pytest.mark.parametrize("decay", [0.01, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 63])
def test_step_weights_are_a_distribution_at_any_size(steps: int, decay: float) -> None:
    weights_K = step_weights(steps, decay)
    assert weights_K.shape == (steps,)
    assert weights_K.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("steps", "decay", "name"), [(0, 0.6, "steps=0"), (3, 0.0, "decay=0"), (3, 1.1, "decay=1.1")])
def test_step_weights_out_of_range_are_refused(steps: int, decay: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        step_weights(steps, decay)


def test_weighted_loss_is_the_weighted_sum_of_the_means_of_each_step() -> None:
    loss_KT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])  # step 2 has one valid token
    loss = weighted_loss(loss_KT, torch.tensor([3, 1]), torch.tensor([0.75, 0.25]))
    assert loss.item() == pytest.approx(0.75 * 2 + 0.25 * 4)


@pytest.mark.parametrize("count_dtype", [torch.int64, torch.float64])
def test_weighted_loss_of_parts_adds_up_to_that_of_the_whole(count_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask_KT = torch.rand(3, 129, generator=generator) < 0.7
    loss_KT = torch.rand(3, 129, generator=generator) * mask_KT
    counts_K, weights_K = mask_KT.sum(-1).to(count_dtype), step_weights(3, 0.6)
    parts = [weighted_loss(part_KT, counts_K, weights_K) for part_KT in loss_KT.split(40, dim=1)]
    torch.testing.assert_close(torch.stack(parts).sum(), weighted_loss(loss_KT, counts_K, weights_K))


def test_a_step_without_valid_tokens_adds_no_loss_and_no_gradient() -> None:
    loss_KT = torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True)
    loss = weighted_loss(loss_KT, torch.tensor([2, 0]), torch.tensor([0.5, 0.5]))
    loss.backward()
    assert loss.item() == 1.0
    assert loss_KT.grad.tolist() == [[0.25, 0.25], [0.0, 0.0]]


def test_weighted_loss_refuses_another_number_of_steps() -> None:
    with pytest.raises(ValueError, match="counts_K"):
        weighted_loss(torch.zeros(3, 5), torch.ones(2), torch.ones(3))


def test_chain_loss_is_the_shortfall_of_the_expected_accepted_length() -> None:
    alpha_KA = torch.tensor([[0.5, 1.0, 0.5], [0.5, 1.0, torch.nan]])
    mask_KA = torch.tensor([[True, True, True], [True, True, False]])
    # Anchor 0 accepts .5 + .25 of 2, anchor 1 all of 2, anchor 2 has one step only.
    torch.testing.assert_close(chain_loss(alpha_KA, mask_KA), torch.tensor([1.25, 0.0, 0.5]))


def test_chain_loss_gradient_equals_finite_differences_even_at_zero_acceptance() -> None:
    alpha_KA = torch.tensor([[0.9, 0.0, 0.4], [0.3, 0.7, 0.5], [0.8, 0.6, 0.2]], dtype=torch.float64)
    mask_KA = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    assert torch.autograd.gradcheck(lambda alpha: chain_loss(alpha, mask_KA), alpha_KA.requires_grad_())


def test_masked_steps_of_a_chain_leak_nothing() -> None:
    alpha_KA = torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]], requires_grad=True)
    mask_KA = torch.tensor([[True, False], [False, False]])
    loss_A = chain_loss(alpha_KA, mask_KA)
    loss_A.sum().backward()
    assert loss_A.tolist() == [0.5, 0.0]
    assert alpha_KA.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("mask_KA", "message"),
    [(torch.tensor([[False], [True]]), "after a masked"), (torch.ones(1, 1).bool(), "one shape")],
)
def test_chain_loss_refuses_a_mask_that_is_no_chain(mask_KA: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain_loss(torch.ones(2, 1), mask_KA)
