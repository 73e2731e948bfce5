"""The number of kernels that a decoding step launches on a GPU, counted on a CPU: small models are bound by it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtptrain.backbone import decode, modules, pooling
from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import run_step
from mtptrain.backbone.modules import FrozenHyperConnection, replace_connections
from tests.tiny import LAYER_TYPES, random_backbone

# A layer, on average over the four kinds.
MOST = 61.25
MOST_ON_A_CPU = 63


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        given = {memory(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = {memory(value) for value in tree_leaves(out) if isinstance(value, Tensor)}
        if operator._schema.is_mutable or not made <= given:
            self.counts[str(operator)] += 1
        return out


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def as_one(kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *places: Any) -> None:
    """Count a function that is one Triton kernel on a GPU as one launch."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        modes = []
        while (mode := torch.utils._python_dispatch._get_current_dispatch_mode()) is not None:
            modes.append(torch.utils._python_dispatch._pop_mode())
            mode.counts[kernel.__name__] += 1
        try:
            return kernel(*args, **kwargs)
        finally:
            for mode in reversed(modes):
                torch.utils._python_dispatch._push_mode(mode)

    for place in places:
        monkeypatch.setattr(place, kernel.__name__, launch)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with torch.inference_mode(), Launches() as launches:
        yield launches.counts


def launches_of_a_pass(periods: int) -> Counter[str]:
    """The launches of a verify pass of four tokens over `periods` times the four kinds of layers."""
    layers = 4 * periods
    overrides = {
        "num_hidden_layers": layers,
        "layer_types": LAYER_TYPES * periods,
        "mlp_layer_types": ["moe"] * layers,
    }
    model = random_backbone(**overrides)
    replace_connections(model, FrozenHyperConnection)
    cache = BackboneCache.allocate(model.config, 1, 64, 4)
    with torch.inference_mode():
        run_step(model, cache, torch.zeros(1, 20, dtype=torch.int64))
    with counted() as counts:
        run_step(model, cache, torch.zeros(1, 4, dtype=torch.int64))
    return counts


def launches_of_layers() -> Counter[str]:
    """The launches of four layers, one of each kind, in a pass that has twice as many."""
    return launches_of_a_pass(2) - launches_of_a_pass(1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Count what a GPU computes in one launch as one."""
    as_one(decode.expand_and_mix, monkeypatch, decode)
    as_one(modules.connect, monkeypatch, modules)
    as_one(modules.norm_and_rotate_, monkeypatch, decode, pooling)
    as_one(decode.rotate_, monkeypatch, decode)
    return monkeypatch


def test_a_layer_of_a_verify_pass_launches_few_kernels(fused: pytest.MonkeyPatch) -> None:
    """The attention of a GPU derives what a query sees from its position, and rotates its output back."""
    as_one(decode.cached_attention, fused, decode)
    fused.setattr(decode, "use_triton", lambda *_: True)
    launches = launches_of_layers()
    assert launches["cached_attention"] == 4
    assert launches["rotate_"] == 1  # of the indexer's queries
    assert launches.total() / 4 <= MOST, launches


def test_a_layer_of_a_verify_pass_runs_few_operators_on_a_cpu(fused: pytest.MonkeyPatch) -> None:
    """The masks are added in the attention, and its output is rotated back in one operator."""
    as_one(decode._masked_attention, fused, decode)
    launches = launches_of_layers()
    assert launches.total() / 4 <= MOST_ON_A_CPU, launches
