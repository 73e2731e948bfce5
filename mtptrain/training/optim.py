"""The optimisers, the fp32 masters that they update, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtptrain.config import OptimizerName, TrainConfig


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
                is_master = parameter.dtype == torch.float32
                self.masters[name] = parameter if is_master else parameter.detach().float().requires_grad_()

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
        """Return the module's state with masters in place of rounded parameters."""
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


def make_adamw(parameters: Sequence[Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with one group per dtype and decay; only tensors of two or more dimensions are decayed."""
    groups = []
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        same = [p for p in parameters if p.dtype == dtype]
        groups.append({"params": [p for p in same if p.ndim >= 2], "weight_decay": config.weight_decay})
        groups.append({"params": [p for p in same if p.ndim < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=True)


def make_optimizers(parameters: list[Tensor], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers of `train.optimizer`; each parameter belongs to one of them.

    `muon` is torch's own. It updates the matrices, with steps scaled to the root mean square of AdamW's so that both
    use one learning rate. AdamW updates vectors and the experts' three-dimensional stacks, which Muon refuses.
    """
    matrices = [p for p in parameters if p.ndim == 2] if config.optimizer is OptimizerName.muon else []
    if not matrices:
        return [make_adamw(parameters, config)]
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for p in parameters if p.ndim != 2]
    return [muon, make_adamw(rest, config)] if rest else [muon]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimiser step `step` (0-based): linear warm-up, then a cosine to the final ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
