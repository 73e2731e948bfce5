"""The routed experts of a head that processes share: masters, optimiser and gradients of this process's own.

An engine trains all other parameters. Both are clipped by the norm of the whole gradient, so the update is that of a
head whose experts are replicated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig
from mtptrain.mtp.expert_parallel import is_share
from mtptrain.run.distributed import rank, sum_over_processes, world_size
from mtptrain.training.engine import TrainingState
from mtptrain.training.optim import MasterWeights, make_optimizers, optimizer_pieces, restore_state
from mtptrain.training.pieces import Piece, StoredTensors, own_piece


class ExpertShares:
    """This process's share of the experts of a module; empty if no process shares any.

    Args:
        module: of the training.
        config: optimiser and clipping.
        scale: factor on the gradients, which undoes an engine's factor on the loss.
        offload: keep masters and optimiser state in CPU memory.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, scale: float = 1.0, offload: bool = False) -> None:
        self.shares = {name: p.detach() for name, p in module.named_parameters() if is_share(p)}
        self.masters = MasterWeights(
            module, is_share, torch.device("cpu") if offload else None, config.accumulation > 1
        )
        self.config, self.scale = config, scale
        self.optimizers = make_optimizers(self.masters.parameters, config)

    def with_norm(self, norm: Tensor) -> Tensor:
        """Return the norm of the whole gradient, given that of all other parameters; called once a step.

        Every process must call it. The result is the same on all and, like its parts, may be infinite or NaN.
        """
        if not self.masters.parameters:
            return norm
        self.masters.pull_gradients()
        gradients = self._gradients()
        for gradient in gradients:
            gradient.mul_(self.scale)
        own = torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else norm.new_zeros(())
        return (norm.square() + sum_over_processes(own.to(norm).square())).sqrt()

    def step(self, rate: float, norm: float) -> None:
        """Clip and update, unless the norm of the whole gradient is not finite; drop the gradients."""
        if math.isfinite(norm):
            factor = min(1.0, self.config.clip_norm / (norm + 1e-6))
            for gradient in self._gradients():
                gradient.mul_(factor)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self.masters.push()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> TrainingState:
        """Return this process's experts and their optimiser's state."""
        masters = self.masters.masters
        module = [self._piece(name, masters.get(name, share)) for name, share in self.shares.items()]
        return TrainingState(module, optimizer_pieces(self.optimizers, self.masters, self._piece))

    def load(self, tensors: StoredTensors, state: StoredTensors) -> None:
        """Take this process's share of stored tensors and state."""
        for name, share in self.shares.items():
            share.copy_(self._read(tensors, name))
        self.masters.load(lambda name: self._read(tensors, name))
        restore_state(self.optimizers, self.masters, state, self._read)

    def _piece(self, name: str, value: Tensor) -> Piece:
        """Return a share as a piece of the whole tensor; rank 0 stores step counts for all."""
        if not value.ndim:
            return own_piece(name, value)
        shape = (world_size() * len(value), *value.shape[1:])
        return Piece(name, shape, rank() * value.numel(), value.detach().flatten())

    def _read(self, stored: StoredTensors, name: str) -> Tensor:
        """Return this process's share of a stored tensor, or a step count."""
        shape = torch.Size(stored.shapes[name])
        if not shape:
            return stored[name]
        size = shape.numel() // world_size()
        return stored.part(name, rank() * size, (rank() + 1) * size).view(-1, *shape[1:])

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.parameters if master.grad is not None]
