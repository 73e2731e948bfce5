"""One optimiser step: its learning rate, its gradient and its betas."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtptrain.batch import Batch
from mtptrain.config import TrainConfig
from mtptrain.data.batches import BatchSource
from mtptrain.losses.next_token import LossOutput
from mtptrain.training.checkpoint import BackboneIdentity
from mtptrain.training.data_parallel import ReplicatedEngine
from mtptrain.training.optim import learning_rate
from mtptrain.training.trainer import Trainer

CONFIG = TrainConfig(
    clip_norm=math.inf, steps=6, warmup_steps=2, learning_rate=0.5, beta1=0.7, beta2=0.8, weight_decay=0.0
)


class Slopes(BatchSource):
    """Batch number n holds the token n + 1."""

    def batch(self, index: int) -> Batch:
        token_BS = torch.full((1, 1), index + 1)
        return Batch(token_BS, torch.ones_like(token_BS), torch.zeros_like(token_BS))


class Linear:
    """A loss whose gradient is the token of the batch, plus a constant."""

    def __init__(self, module: nn.Module, constant: float = 0.0) -> None:
        self.module, self.constant = module, constant

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones(1, dtype=torch.float64)

    def __call__(self, batch: Batch, counts_K: Tensor) -> LossOutput:
        loss = self.module.weight.float().sum() * batch.tokens_BS.item() + self.constant
        return LossOutput(loss, {"loss": loss.detach().double().unsqueeze(0)})


def trainer(dtype: torch.dtype = torch.float32, constant: float = 0.0) -> Trainer:
    module = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.zeros_(module.weight)
    engine, identity = ReplicatedEngine(module, CONFIG), BackboneIdentity("test", "ab" * 32, {})
    return Trainer(engine, Linear(module, constant), Slopes(), CONFIG, Path("unused"), identity)


def test_every_step_takes_the_learning_rate_of_its_number() -> None:
    one = trainer()
    rates: list[float] = []
    one.engine.optimizers[0].register_step_pre_hook(
        lambda optimizer, *_: rates.append(next(group["lr"] for group in optimizer.param_groups if group["params"]))
    )
    for _ in range(CONFIG.steps):
        one.train_step()
    assert rates == [learning_rate(step, CONFIG) for step in range(CONFIG.steps)]
    assert len(set(rates)) > 2


def test_a_step_has_the_gradient_of_its_own_batch() -> None:
    one = trainer()
    assert [one.train_step().norm for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_the_first_and_second_moments_have_their_own_betas() -> None:
    one = trainer()
    one.train_step()
    state = {piece.name: piece.values for piece in one.engine.state().optimizer}
    assert state["weight/exp_avg"].item() == pytest.approx(1 - CONFIG.beta1)
    assert state["weight/exp_avg_sq"].item() == pytest.approx(1 - CONFIG.beta2)


def test_a_bf16_parameter_takes_its_masters_rounded_value() -> None:
    one = trainer(torch.bfloat16)
    for _ in range(2):
        one.train_step()
    (master,) = one.engine.masters.parameters
    assert master.item() < 0
    assert one.engine.module.weight.item() == master.bfloat16().item()


def test_a_loss_that_is_not_finite_skips_the_step_even_if_its_gradient_is() -> None:
    one = trainer(constant=torch.inf)
    assert one.train_step().sums_K == {}
    assert one.engine.module.weight.item() == 0
    assert one.counters["skipped_steps"] == 1
