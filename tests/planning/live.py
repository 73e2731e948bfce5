"""The bytes of all tensors that are alive, on any device, also on the meta device."""

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return inside a `with` block, until they are freed.

    Attributes:
        now: bytes alive.
        peak: the most since the last `reset`.
        ignored: device whose tensors are not counted.

    Args:
        ignored: see above.
        modules: their tensors count from the beginning.
    """

    def __init__(self, ignored: str, *modules: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.ignored = ignored
        self.sizes: dict[int, int] = {}
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self.add(tensor)

    def add(self, value: Any) -> None:
        """Count a tensor from now on, unless it shares a storage that is counted."""
        if not isinstance(value, Tensor) or value.device.type == self.ignored:
            return
        storage = value.untyped_storage()
        address = storage._cdata
        if address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, address)
            self.peak = max(self.peak, self.now)

    def _free(self, address: int) -> None:
        self.now -= self.sizes.pop(address, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self.add(value)
        return out

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.now


def total_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
