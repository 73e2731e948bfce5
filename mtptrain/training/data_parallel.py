"""`engine=single`: every process holds the whole module and its optimiser; gradients are summed over processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig
from mtptrain.mtp.expert_parallel import is_share
from mtptrain.run.distributed import sum_over_processes, world_size
from mtptrain.training.engine import TrainingState
from mtptrain.training.expert_shares import ExpertShares
from mtptrain.training.optim import MasterWeights, make_optimizers, optimizer_pieces, restore_state
from mtptrain.training.pieces import StoredTensors, own_piece


class ReplicatedEngine:
    """Plain data parallelism with fp32 masters; see `Engine`.

    Args:
        module: its parameters that require gradients are trained.
        config: optimiser and clipping.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.masters = MasterWeights(module, lambda p: not is_share(p), accumulates=config.accumulation > 1)
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
        total = self.shares.with_norm(
            own.to(next(self.module.parameters()).device)
        )  # that of no gradient is on the CPU
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

    def state(self) -> TrainingState:
        """Return this process's equal share of every tensor, and its share of the experts."""
        whole = {name: value for name, value in self.masters.tensors().items() if name not in self.shares.shares}
        shared = self.shares.state()
        return TrainingState(
            [*(own_piece(name, value) for name, value in whole.items()), *shared.module],
            [*optimizer_pieces(self.optimizers, self.masters, own_piece), *shared.optimizer],
        )

    @torch.no_grad()
    def load(self, tensors: StoredTensors, state: StoredTensors) -> None:
        """Continue from stored tensors and state."""
        for name, value in self.module.state_dict().items():
            if name not in self.shares.shares:
                value.copy_(tensors[name])
        self.masters.load(tensors.__getitem__)
        self.shares.load(tensors, state)
        restore_state(self.optimizers, self.masters, state, StoredTensors.__getitem__)
