"""AdamW, its learning-rate schedule, and the balancing of routed experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over a module's trainable parameters; only tensors of two dimensions or more are decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up, then a cosine to the final ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class RouterBalancer:
    """Auxiliary-loss-free load balancing: an expert's selection bias rises when it is chosen too rarely.

    b_e += rate * sign(mean load - load_e), after every optimiser step. Source: arXiv 2412.19437, section 2.1.2.

    Args:
        module: holds top-k routers (anything with `e_score_correction_bias`, whose forward returns (_, _, indices)).
        rate: size of one correction; 0 leaves the biases alone.
    """

    def __init__(self, module: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = [m for m in module.modules() if hasattr(m, "e_score_correction_bias")] if rate > 0 else []
        self.loads: list[Tensor] = [torch.zeros_like(router.e_score_correction_bias) for router in self.routers]
        for number, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(number))

    def _counter(self, number: int):  # noqa: ANN202 - the hook's type is torch's own
        def count(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if torch.is_grad_enabled():
                load = self.loads[number]
                load += torch.bincount(output[2].flatten(), minlength=load.numel()).to(load.dtype)

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Correct every bias once by the loads since the last call."""
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias.add_(self.rate * torch.sign(load.mean() - load))
            load.zero_()
