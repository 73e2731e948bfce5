"""Steps of fixed shapes, which are recorded on a GPU and traced on a CPU, and the verify pass as such a step."""

# B rows, L verified positions, N residual streams, D model width, V vocabulary

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import run_step
from mtptrain.backbone.placement import is_shared
from mtptrain.backbone.traced import TensorFunction, Traced, log_once, tracing_obstacle
from mtptrain.decoding.captured import Captured, can_record


class Step(Protocol):
    """A function of tensors.

    Attributes:
        is_static: whether the shapes of its inputs must not depend on the texts.
        records_first: whether its first call with new shapes takes long, and is not to be timed.
    """

    is_static: bool
    records_first: bool

    @property
    def function(self) -> TensorFunction:
        """The computation, from tensors to a tuple of tensors."""
        ...

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's result."""
        ...


@dataclass(slots=True)
class Eager:
    """A function that simply runs."""

    function: TensorFunction
    is_static: bool = False
    records_first: bool = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's result."""
        return self.function(*inputs)


@dataclass(slots=True, frozen=True)
class Recordable:
    """A function of tensors with static shapes and all that it depends on.

    Attributes:
        function: maps tensors to a tuple of tensors. In inference mode it reads no value on the host and writes to
            nothing but the state.
        modules: modules whose weights it reads; the first is the one that it belongs to.
        state: other tensors that it reads or writes.
        counters: the tensors of the state that a call advances.
        constants: all other values that it depends on.
        calls: calls to expect from one run, about.
    """

    function: TensorFunction
    modules: Sequence[nn.Module]
    state: Sequence[Tensor] = ()
    counters: Sequence[Tensor] = ()
    constants: Hashable = field(default=())
    calls: int = 1


def make_step(model: DeepseekV4ForCausalLM, step: Recordable) -> Step:
    """Return the step in the fastest form that the backbone's device and placement allow; log why if it is eager."""
    if can_record(model):
        return Captured(step.function, step.counters)
    if model.lm_head.weight.is_cpu and not is_shared(model):
        obstacle = tracing_obstacle(step.modules)
        if obstacle is None:
            return Traced(step.function, step.modules, step.state, step.constants, step.calls)
        log_once(f"running without traces, because {obstacle}")
    return Eager(step.function)


def verify_step(model: DeepseekV4ForCausalLM, cache: BackboneCache, calls: int = 1) -> Step:
    """Return a verify pass, from int64 tokens [B, L] to streams [B, L, N, D] and logits [B, L, V].

    The caller must make sure that the cache has room for the tokens; a recorded step cannot check it.

    Args:
        model: the backbone.
        cache: state of the rows.
        calls: passes to expect, about.
    """

    def verify(tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        streams_BLND, hidden_BLD = run_step(model, cache, tokens_BL)
        return streams_BLND, model.lm_head(hidden_BLD)

    counters = (cache.length_B, cache.written_B)
    constants = ("verify", cache.window, cache.max_length)
    return make_step(model, Recordable(verify, [model], cache.tensors(), counters, constants, calls))
