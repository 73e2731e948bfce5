"""The optimisers, the fp32 masters that they update, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mtptrain.config import OptimizerName, TrainConfig
from mtptrain.training.muon import Muon
from mtptrain.training.pieces import Piece, StoredTensors


class MasterWeights:
    """The fp32 tensors that the optimiser updates; a parameter that is fp32 already is its own master.

    Args:
        module: its trainable parameters get masters.
        choose: returns whether a parameter gets one; None chooses all.
        device: of the masters; None for that of each parameter.
        accumulates: whether gradients of several micro-batches are summed; fp32 sums then replace each gradient as
            soon as a backward has it.
    """

    def __init__(
        self,
        module: nn.Module,
        choose: Callable[[Tensor], bool] | None = None,
        device: torch.device | None = None,
        accumulates: bool = False,
    ) -> None:
        self.module = module
        self.masters: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (choose is None or choose(parameter)):
                is_master = parameter.dtype == torch.float32 and device in (None, parameter.device)
                copy = parameter.detach().to(device or parameter.device, torch.float32)
                self.masters[name] = parameter if is_master else copy.requires_grad_()
        for name, parameter in self._copies() if accumulates else []:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._add_gradient(name, p))

    @property
    def parameters(self) -> list[Tensor]:
        """The masters, in the order of the module's parameters."""
        return list(self.masters.values())

    def pull_gradients(self) -> None:
        """Move the gradients of lower-precision parameters to their masters."""
        for name, parameter in self._copies():
            if parameter.grad is not None:
                self.masters[name].grad = parameter.grad.to(self.masters[name])
                parameter.grad = None

    def _add_gradient(self, name: str, parameter: Tensor) -> None:
        """Move the gradient of one micro-batch."""
        assert parameter.grad is not None
        master = self.masters[name]
        gradient = parameter.grad.to(master)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
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
    def load(self, values: Callable[[str], Tensor]) -> None:
        """Take the masters' values by name and round them into the module."""
        for name, master in self.masters.items():
            master.copy_(values(name))
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

    `muon` updates matrices and the experts' stacks of them, with steps scaled to the root mean square of AdamW's, so
    that both use one learning rate. AdamW updates vectors and scalars.
    """
    is_muon = config.optimizer is OptimizerName.muon
    matrices = [p for p in parameters if is_muon and p.ndim > 1]
    rest = [p for p in parameters if not is_muon or p.ndim < 2]
    muon = [Muon(matrices, config.learning_rate, config.weight_decay)] if matrices else []
    return [*muon, *([make_adamw(rest, config)] if rest else [])]


Part = Callable[[str, Tensor], Piece]  # name, tensor of this process -> the piece that it stores
Read = Callable[[StoredTensors, str], Tensor]  # stored tensors, name -> values of this process


def optimizer_pieces(optimizers: Sequence[torch.optim.Optimizer], masters: MasterWeights, part: Part) -> list[Piece]:
    """Return the pieces of the optimisers' state that this process stores."""
    states = {id(master): state for optimizer in optimizers for master, state in optimizer.state.items()}
    trained = [(name, states[id(p)]) for name, p in masters.masters.items() if id(p) in states]
    return [part(f"{name}/{key}", value) for name, state in trained for key, value in state.items()]


def restore_state(
    optimizers: Sequence[torch.optim.Optimizer], masters: MasterWeights, state: StoredTensors, read: Read
) -> None:
    """Give optimisers their stored state."""
    for optimizer in optimizers:
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, master in masters.masters.items():
            values = {key: read(state, f"{name}/{key}") for key in state.keys_of(name)}
            if id(master) in updated and values:
                optimizer.state[master] = {key: _on_device_of(value, master) for key, value in values.items()}


def _on_device_of(value: Tensor, master: Tensor) -> Tensor:
    """Return a copy of an optimiser's tensor on the device of its master; AdamW keeps its step count on the CPU."""
    return value.to(master.device, copy=True) if value.ndim else value.clone()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimiser step `step` (0-based): linear warm-up, then a cosine to the final ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
