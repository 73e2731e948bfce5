"""`engine=single`: every process holds the whole module and its optimiser; gradients are summed over processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig
from mtptrain.run.distributed import sum_over_processes, world_size
from mtptrain.training.engine import OptimizerState
from mtptrain.training.optim import MasterWeights, make_optimizers


class ReplicatedEngine:
    """Plain data parallelism with fp32 masters; see `Engine`.

    Args:
        module: its parameters that require gradients are trained.
        config: optimiser and clipping.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.masters = MasterWeights(module)
        self.optimizers = make_optimizers(self.masters.parameters, config)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        loss.backward()

    def step(self, rate: float) -> float:
        """Sum, clip and update; return the gradient norm before clipping."""
        self.masters.pull_gradients()
        if world_size() > 1:
            self._sum_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters.parameters, self.config.clip_norm).item()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self.masters.push()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_gradients(self) -> None:
        """Sum the gradients of all processes in one all-reduce."""
        parameters = self.masters.parameters
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        parts = sum_over_processes(flat).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's state with masters in place of rounded parameters."""
        return self.masters.tensors()

    def optimizer_state(self) -> OptimizerState:
        """Return the optimiser's state by tensor name."""
        states = {id(master): state for optimizer in self.optimizers for master, state in optimizer.state.items()}
        return {name: dict(states[id(p)]) for name, p in self.masters.masters.items() if id(p) in states}

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Continue from stored tensors and state."""
        self.module.load_state_dict(tensors)
        self.masters.load(tensors)
        for optimizer in self.optimizers:
            updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, master in self.masters.masters.items():
                if id(master) in updated and name in state:
                    optimizer.state[master] = {key: _on_device_of(value, master) for key, value in state[name].items()}


def _on_device_of(value: Tensor, master: Tensor) -> Tensor:
    """Return a tensor of the optimiser's state on the device of its master; AdamW keeps its step count on the CPU."""
    return value.to(master.device) if value.ndim else value.clone()
