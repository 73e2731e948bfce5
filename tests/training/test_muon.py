"""Muon against torch's, which takes every matrix of a stack as a tensor of its own."""

import pytest
import torch
from torch import Tensor

from mtptrain.training import muon
from mtptrain.training.muon import ROOT_MEAN_SQUARE, Muon, orthogonalize

RATE, DECAY, STEPS = 1e-2, 0.3, 3
SHAPES = [(16, 16), (3, 24), (24, 3), (3, 24), (5, 24, 8), (2, 8, 24), (4, 8)]


def matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the matrices of tensors, in their order."""
    return [one.detach().clone() for tensor in tensors for one in (tensor if tensor.ndim == 3 else tensor[None])]


class Case:
    """Random weights, and gradients for some steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]

    def ours(self) -> list[Tensor]:
        """Return the matrices after the steps of our Muon on whole tensors."""
        parameters = [weight.clone().requires_grad_() for weight in self.weights]
        optimizer = Muon(parameters, RATE, DECAY)
        for gradients in self.gradients:
            take_step([optimizer], parameters, gradients)
        return matrices(parameters)


def take_step(optimizers: list[torch.optim.Optimizer], parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()


def test_matrices_move_as_torchs_muon_moves_them_to_the_rounding_of_bf16() -> None:
    case = Case()
    alone = [matrix.requires_grad_() for matrix in matrices(case.weights)]
    torchs = torch.optim.Muon(alone, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for gradients in case.gradients:
        take_step([torchs], alone, matrices(gradients))
    for ours, theirs in zip(case.ours(), alone, strict=True):
        step = RATE * ROOT_MEAN_SQUARE * max(ours.shape) ** 0.5  # of a singular value of 1
        # Values around 1 are rounded by 2^-9 in each of 15 products; seen are up to four roundings of 2^-8 a step.
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=STEPS * step * 2**-5)


@pytest.mark.parametrize("size", [1, 400, 2**26])
def test_stacks_and_batches_of_any_size_move_as_their_matrices_one_by_one(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case()
    alone = [matrix.requires_grad_() for matrix in matrices(case.weights)]
    optimizers = [Muon([matrix], RATE, DECAY) for matrix in alone]
    for gradients in case.gradients:
        take_step(optimizers, alone, matrices(gradients))
    monkeypatch.setattr(muon, "BATCH", size)
    for ours, theirs in zip(case.ours(), alone, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=2**-18, atol=2**-18)


def test_singular_values_come_near_1_and_their_vectors_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, 8, 20, generator=generator), full_matrices=False)
    values_K = torch.linspace(0.1, 1, 8)
    found = left.mT @ orthogonalize(left * values_K @ right) @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=2**-14)


def test_a_matrix_of_zeros_only_decays() -> None:
    parameter = torch.ones(2, 3, requires_grad=True)
    take_step([Muon([parameter], RATE, DECAY)], [parameter], [torch.zeros(2, 3)])
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 1 - RATE * DECAY))
