"""What a CUDA graph does, done on a CPU: the operations of one run, played again on the very same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtptrain.decoding import captured
from mtptrain.decoding.captured import Captured, Recording


class Tape(TorchDispatchMode):
    """Records every operation with the tensors it read and wrote; nothing of Python is played again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is asked for, which waits for the device")
        out = operation(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(out)):  # not what asks for a shape
            self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the operations again; what they return goes where it went before."""
        for operation, args, kwargs, before in self.calls:
            inputs = {memory(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            if not operation._schema.is_mutable and all(memory(value) in inputs for value in tree_leaves(before)):
                continue  # a view sees what its base holds
            found = tree_leaves(operation(*args, **kwargs))
            for old, new in zip(tree_leaves(before), found, strict=True):
                if old is not new:
                    old.copy_(new)


def memory(tensor: Tensor) -> int:
    """Where its values lie."""
    return tensor.untyped_storage().data_ptr()


def record_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Make `Captured` record tapes instead of graphs; those that it records are added to the list."""
    tapes: list[Tape] = []

    def record(self: Captured, inputs: tuple[Tensor, ...]) -> Recording:
        own = [value.clone() for value in inputs]
        for _ in range(captured.WARM_UPS):
            self.warm_up(*own)
        # A graph is recorded without running, so what a tape's recording counts is taken back.
        before = [counter.clone() for counter in self.counters]
        tapes.append(Tape())
        with tapes[-1]:
            outputs = self.function(*own)
        for counter, value in zip(self.counters, before, strict=True):
            counter.copy_(value)
        return Recording(own, tapes[-1], outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Captured, "_record", record)
    monkeypatch.setattr(captured, "can_record", lambda model: True)
    return tapes
