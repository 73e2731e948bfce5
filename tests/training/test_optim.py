import pytest
import torch
from torch import nn

from mtptrain.config import OptimizerName, TrainConfig
from mtptrain.training.muon import Muon
from mtptrain.training.optim import MasterWeights, learning_rate, make_adamw, make_optimizers


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0)])
def test_the_learning_rate_warms_up_linearly(step: int, factor: float) -> None:
    config = TrainConfig(learning_rate=2.0, warmup_steps=10, steps=100)
    assert learning_rate(step, config) == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_learning_rate_falls_along_a_cosine_to_its_final_ratio(ratio: float) -> None:
    config = TrainConfig(learning_rate=2.0, warmup_steps=10, steps=110, final_learning_rate_ratio=ratio)
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(1.0 + ratio)
    assert learning_rate(110, config) == pytest.approx(2.0 * ratio)
    assert learning_rate(500, config) == pytest.approx(2.0 * ratio)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 10), (63, 7)])
def test_every_step_of_a_run_has_a_learning_rate_above_zero(steps: int, warmup: int) -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=warmup, steps=steps)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(steps))


def test_only_matrices_are_decayed() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(7, 5))
    optimizer = make_adamw(list(module.parameters()), TrainConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(module.parameters()))
    assert all(decays[id(p)] == (0.3 if p.ndim >= 2 else 0.0) for p in module.parameters())


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.Linear(3, 3, bias=False)])
def test_a_module_with_nothing_in_one_group_can_be_trained(module: nn.Module) -> None:
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = make_adamw(list(module.parameters()), TrainConfig(learning_rate=0.1))
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_steps_below_the_rounding_of_bf16_add_up_in_the_masters() -> None:
    module = nn.Linear(3, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    masters = MasterWeights(module)
    optimizer = torch.optim.SGD(masters.parameters, lr=2**-12)  # bf16 around 1 has steps of 2^-8 and 2^-7
    for _ in range(64):
        module(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        masters.pull_gradients()
        optimizer.step()
        masters.push()
    assert module.weight.tolist() == [[1 - 64 * 2**-12] * 3]


def test_masters_are_stored_in_fp32_and_restored_without_rounding() -> None:
    module = nn.Linear(3, 5).bfloat16()
    masters = MasterWeights(module)
    tensors = {name: value + 1e-4 * torch.rand_like(value) for name, value in masters.tensors().items()}
    other = nn.Linear(3, 5).bfloat16()
    restored = MasterWeights(other)
    restored.load(tensors.__getitem__)
    torch.testing.assert_close(restored.tensors(), tensors, rtol=0, atol=0)
    assert torch.equal(other.weight, tensors["weight"].bfloat16())


def test_a_frozen_parameter_has_no_master() -> None:
    module = nn.Linear(3, 5)
    module.bias.requires_grad_(False)
    assert list(MasterWeights(module).masters) == ["weight"]


def test_muon_takes_the_matrices_and_the_stacks_of_them_and_adamw_the_rest() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Conv1d(5, 2, 3))  # whose weight is a stack of two
    muon, adamw = make_optimizers(list(module.parameters()), TrainConfig(optimizer=OptimizerName.muon))
    taken = [[p.ndim for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert isinstance(muon, Muon)
    assert taken == [[2, 3], [1, 1, 1, 1]]


@pytest.mark.parametrize("module", [nn.Linear(3, 5, bias=False), nn.LayerNorm(3)])
def test_muon_trains_a_module_with_nothing_for_the_other_optimiser(module: nn.Module) -> None:
    config = TrainConfig(optimizer=OptimizerName.muon)
    optimizers = make_optimizers(list(module.parameters()), config)
    assert len(optimizers) == 1
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.randn(4, 3)).square().sum().backward()
    optimizers[0].step()
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
