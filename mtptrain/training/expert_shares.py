"""The routed experts of a head that processes share: masters, optimiser and gradients of this process's own.

An engine trains all other parameters. Both are clipped by the norm of the whole gradient, so the update is that of a
head whose experts are replicated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtptrain.config import TrainConfig
from mtptrain.mtp.expert_parallel import is_share, own_share
from mtptrain.run.distributed import join_on_rank0, sum_over_processes
from mtptrain.training.engine import OptimizerState
from mtptrain.training.optim import MasterWeights, make_adamw, named_state, restore_state


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
        self.masters = MasterWeights(module, lambda p: is_share(p), torch.device("cpu") if offload else None)
        self.config, self.scale = config, scale
        trained = self.masters.parameters
        self.optimizers = [make_adamw(trained, config)] if trained else []

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
        if math.isfinite(norm) and self.optimizers:
            factor = min(1.0, self.config.clip_norm / (norm + 1e-6))
            for gradient in self._gradients():
                gradient.mul_(factor)
            for group in self.optimizers[0].param_groups:
                group["lr"] = rate
            self.optimizers[0].step()
            self.masters.push()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole tensors of which this process holds shares, with fp32 masters, on rank 0."""
        return {name: join_on_rank0(self.masters.masters.get(name, share)) for name, share in self.shares.items()}

    def optimizer_state(self) -> OptimizerState:
        """Return the optimiser's state of the whole tensors, on rank 0."""
        return {
            name: {key: join_on_rank0(value) if value.ndim else value for key, value in state.items()}
            for name, state in named_state(self.optimizers, self.masters).items()
        }

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Take this process's share of stored tensors and state."""
        for name, share in self.shares.items():
            share.copy_(own_share(tensors[name]))
        self.masters.load({name: own_share(tensors[name]) for name in self.masters.masters})
        own = {
            name: {key: own_share(value) if value.ndim else value for key, value in state[name].items()}
            for name in self.masters.masters
            if name in state
        }
        restore_state(self.optimizers, self.masters, own)

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.parameters if master.grad is not None]
