"""The interface between the training loop and the engines that hold the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from mtptrain.config import EngineName, TrainConfig
from mtptrain.training.pieces import Piece, StoredTensors


class TrainingState(NamedTuple):
    """The pieces that a process stores; those of all processes add up to whole tensors.

    Attributes:
        module: of the module's state, with fp32 masters in place of rounded parameters.
        optimizer: of the optimiser's state, named `TENSOR/KEY` by the trained tensor and the optimiser's own key.
    """

    module: list[Piece]
    optimizer: list[Piece]


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

    def state(self) -> TrainingState:
        """Return this process's pieces of the training's state. Every process must call it."""
        ...

    def load(self, tensors: StoredTensors, state: StoredTensors) -> None:
        """Restore the module's tensors and the optimiser's state that processes with this or any other engine wrote."""
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
