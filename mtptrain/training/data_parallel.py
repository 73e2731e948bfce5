"""`engine=single`: every process holds the whole module and its optimiser; gradients are summed over processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig
from mtptrain.mtp.expert_parallel import is_share
from mtptrain.run.distributed import sum_over_processes, world_size
from mtptrain.training.engine import OptimizerState
from mtptrain.training.expert_shares import ExpertShares
from mtptrain.training.optim import MasterWeights, make_optimizers, named_state, restore_state


class ReplicatedEngine:
    """Plain data parallelism with fp32 masters; see `Engine`.

    Args:
        module: its parameters that require gradients are trained.
        config: optimiser and clipping.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.masters = MasterWeights(module, lambda p: not is_share(p))
        self.shares = ExpertShares(module, config)
        self.optimizers = make_optimizers(self.masters.parameters, config)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        loss.backward()

    def step(self, rate: float) -> float:
        """Sum, clip and update; return the gradient norm before clipping."""
        self.masters.pull_gradients()
        if world_size() > 1:
            self._sum_gradients()
        parameters = self.masters.parameters
        own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = self.shares.with_norm(own)
        nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, total)
        norm = total.item()
        self.shares.step(rate, norm)
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
        if not parameters:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        parts = sum_over_processes(flat).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's state with masters in place of rounded parameters."""
        return {**self.masters.tensors(), **self.shares.tensors()}

    def optimizer_state(self) -> OptimizerState:
        """Return the optimiser's state by tensor name."""
        return {**named_state(self.optimizers, self.masters), **self.shares.optimizer_state()}

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Continue from stored tensors and state."""
        whole = {name: tensor for name, tensor in tensors.items() if name not in self.shares.shares}
        self.module.load_state_dict(whole, strict=False)  # `fitting_tensors` has compared the names
        self.masters.load(tensors)
        self.shares.load(tensors, state)
        restore_state(self.optimizers, self.masters, state)
