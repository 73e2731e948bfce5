"""AdamW on fp32 masters, its learning-rate schedule, and the balancing of routed experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig


class MasterWeights:
    """The fp32 tensors that the optimiser updates; a parameter that is fp32 already is its own master.

    Args:
        module: its trainable parameters get masters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.masters: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_own = parameter.dtype == torch.float32
                self.masters[name] = parameter if is_own else parameter.detach().float().requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """The masters, in the order of the module's parameters."""
        return list(self.masters.values())

    def pull_gradients(self) -> None:
        """Move the gradients of lower-precision parameters to their masters."""
        for name, parameter in self._copies():
            if parameter.grad is not None:
                self.masters[name].grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Round the masters into the module."""
        for name, parameter in self._copies():
            parameter.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """The module's state with masters in place of rounded parameters."""
        return {name: self.masters.get(name, value).detach() for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the masters' values from stored tensors and round them into the module."""
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.push()

    def _copies(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, p)
            for name, p in self.module.named_parameters()
            if name in self.masters and self.masters[name] is not p
        ]


def make_optimizer(parameters: list[Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only tensors of two dimensions or more are decayed."""
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
        self.biases: list[Tensor] = [router.get_buffer("e_score_correction_bias") for router in self.routers]
        self.loads = [torch.zeros_like(bias_E) for bias_E in self.biases]
        for number, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(number))

    def _counter(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Tensor, Tensor, Tensor]], None]:
        def count(_module: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            if torch.is_grad_enabled():
                load = self.loads[number]
                load += torch.bincount(output[2].flatten(), minlength=load.numel()).to(load.dtype)

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Correct every bias once by the loads since the last call."""
        for bias_E, load_E in zip(self.biases, self.loads, strict=True):
            bias_E.add_(self.rate * torch.sign(load_E.mean() - load_E))
            load_E.zero_()
