"""The interface between the training loop and the engines that hold the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from mtptrain.config import EngineName, TrainConfig

# The optimiser's state by the name of the trained tensor, then by the optimiser's own key.
OptimizerState = dict[str, dict[str, Tensor]]


class Engine(Protocol):
    """Trains the parameters of a module that require gradients, with the same result on every process.

    Attributes:
        module: the module in training. Its parameters may be rounded and, outside a forward, held by other processes.
    """

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss; called `accumulation` times a step."""
        ...

    def step(self, rate: float) -> float:
        """Sum the gradients of all processes, clip them and update; skip the update if the gradient is not finite.

        Args:
            rate: the learning rate.

        Returns:
            The norm of the whole gradient before clipping, the same on every process.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's state with fp32 masters in place of rounded parameters, complete on rank 0.

        Every process must call it.
        """
        ...

    def optimizer_state(self) -> OptimizerState:
        """Return the optimiser's state, complete on rank 0. Every process must call it."""
        ...

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Restore the results of `tensors` and `optimizer_state`, of this or any other engine."""
        ...


def make_engine(
    name: EngineName,
    module: nn.Module,
    config: TrainConfig,
    offload: bool = False,
    passed: Mapping[str, Any] = MappingProxyType({}),
) -> Engine:
    """Return the engine of a run.

    Args:
        name: the engine.
        module: its parameters that require gradients are trained.
        config: optimiser and clipping.
        offload: keep the optimiser's state in CPU memory.
        passed: settings of DeepSpeed; see `passed_settings`.
    """
    if name is EngineName.single:
        from mtptrain.training.data_parallel import ReplicatedEngine

        return ReplicatedEngine(module, config)
    from mtptrain.training.zero_engine import ZeroEngine  # importing DeepSpeed takes seconds

    return ZeroEngine(module, config, int(name.value.removeprefix("zero")), offload, passed)
