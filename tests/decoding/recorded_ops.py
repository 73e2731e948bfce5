"""A CUDA graph's behaviour on a CPU: the ops of one run are recorded and replayed on the very same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtptrain.decoding import captured, steps
from mtptrain.decoding.captured import Captured, Recording


class RecordedOps(TorchDispatchMode):
    """Records every op with its input and output tensors, for a replay without Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("reading a value waits for the device")
        out = operation(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(out)):  # queries of a shape need no replay
            self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the ops again and copy their results into the same output tensors."""
        for operation, args, kwargs, before in self.calls:
            inputs = {memory(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            if not operation._schema.is_mutable and all(memory(value) in inputs for value in tree_leaves(before)):
                continue  # a view follows its base
            after = tree_leaves(operation(*args, **kwargs))
            for old, new in zip(tree_leaves(before), after, strict=True):
                if old is not new:
                    old.copy_(new)


def memory(tensor: Tensor) -> int:
    """Return the address of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[RecordedOps]:
    """Make `Captured` record ops instead of CUDA graphs, and return the list that collects the recordings."""
    recordings: list[RecordedOps] = []

    def record(self: Captured, inputs: tuple[Tensor, ...]) -> Recording:
        static_inputs = [value.clone() for value in inputs]
        for _ in range(captured.WARM_UPS):
            self.warm_up(*static_inputs)
        # A graph is recorded without running, so the counters are restored after recording the ops.
        before = [counter.clone() for counter in self.counters]
        recordings.append(RecordedOps())
        with recordings[-1]:
            outputs = self.function(*static_inputs)
        for counter, value in zip(self.counters, before, strict=True):
            counter.copy_(value)
        return Recording(static_inputs, recordings[-1], outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Captured, "_record", record)
    monkeypatch.setattr(steps, "can_record", lambda model: True)
    return recordings
