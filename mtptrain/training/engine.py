"""What the training loop asks of an engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from mtptrain.config import EngineName, TrainConfig

# The optimiser's state of every trained tensor by the tensor's name, each entry as the optimiser names it.
OptimizerState = dict[str, dict[str, Tensor]]


class Engine(Protocol):
    """Trains the parameters of a module that require gradients, on every process alike.

    Attributes:
        module: computes with the parameters; they may be rounded or, outside a forward, elsewhere.
    """

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss; called `accumulation` times a step."""
        ...

    def step(self, rate: float) -> float:
        """Sum the gradients of all processes, clip them and update; a gradient that is not finite changes nothing.

        Args:
            rate: the learning rate.

        Returns:
            The norm of the whole gradient before clipping, the same on every process.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The module's state with fp32 masters in place of rounded parameters, whole on rank 0; all processes call."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state, whole on rank 0; all processes call."""
        ...

    def load(self, tensors: dict[str, Tensor], state: OptimizerState) -> None:
        """Take what `tensors` and `optimizer_state` of any engine returned."""
        ...


def make_engine(name: EngineName, module: nn.Module, config: TrainConfig, offload: bool = False) -> Engine:
    """The engine of a run.

    Args:
        name: the engine.
        module: its parameters that require gradients are trained.
        config: optimiser and clipping.
        offload: keep the optimiser's state in the CPU's memory.
    """
    if name is EngineName.single:
        from mtptrain.training.data_parallel import ReplicatedEngine

        return ReplicatedEngine(module, config)
    from mtptrain.training.zero_engine import ZeroEngine  # importing DeepSpeed takes seconds

    return ZeroEngine(module, config, int(name.value.removeprefix("zero")), offload)
