"""Decoding steps recorded in CUDA graphs: one launch instead of the hundreds that a small model's step takes."""

# B rows, L verified positions, N residual streams, D model width, V vocabulary

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import run_step
from mtptrain.backbone.placement import is_shared

WARM_UPS = 2  # libraries and kernels initialise in their first runs, and a graph cannot record that


class Recording(NamedTuple):
    """A CUDA graph with its static input and output tensors."""

    inputs: list[Tensor]
    graph: torch.cuda.CUDAGraph
    outputs: Any


def can_record(model: DeepseekV4ForCausalLM) -> bool:
    """Return whether steps of the backbone can be recorded; on a GPU, log once the reason if not."""
    weight = model.lm_head.weight
    if not weight.is_cuda:
        return False
    reason = recording_obstacle(model, torch.cuda.get_device_capability(weight.device))
    if reason is not None:
        _log_once(f"decoding without CUDA graphs, because {reason}")
    return reason is None


def recording_obstacle(model: DeepseekV4ForCausalLM, capability: tuple[int, int]) -> str | None:
    """Return the reason why a CUDA graph cannot hold a step of the backbone, or None if it can.

    Args:
        model: the backbone.
        capability: compute capability of the GPU, (major, minor).

    Source: torch's grouped matrix products of the experts, `GroupedBlas.cpp` of 2.10: with bf16 on compute capability 9
    and 10 they stay on the device; otherwise the host waits for the group sizes.
    """
    if is_shared(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        return "the backbone is spread over devices or processes"
    dtypes = {weight.dtype for name, weight in model.named_parameters() if ".experts." in name}
    if dtypes != {torch.bfloat16}:
        return f"experts in {', '.join(sorted(map(str, dtypes)))} make torch wait for the device; set precision=bf16"
    if capability[0] not in (9, 10):
        return f"torch's expert products wait for the device on compute capability {capability[0]}.{capability[1]}"
    return None


@cache
def _log_once(message: str) -> None:
    logging.getLogger("mtptrain.decoding").warning(message)


class Captured:
    """A function of tensors that is recorded by its first call on a GPU and then replayed; elsewhere it simply runs.

    A result stays valid until the next call with inputs of the same shapes. Apart from its inputs, the function may
    only read and write tensors that live as long as this object, and must not wait for the device.

    Args:
        function: maps tensors to any structure of tensors.
        model: the backbone that the function calls; `can_record` decides whether it is recorded.
        counters: tensors that a call advances. They are restored after each warm-up run. Anything else that a warm-up
            run writes must be written again by the next run, as the cache slots of a rejected draft are.
    """

    def __init__(
        self, function: Callable[..., Any], model: DeepseekV4ForCausalLM, counters: Sequence[Tensor] = ()
    ) -> None:
        self.function, self.counters = function, counters
        self.records = can_record(model)
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the function's result."""
        if not self.records:
            return self.function(*inputs)
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = self._record(inputs)
        recording = self.recordings[shapes]
        for static, new in zip(recording.inputs, inputs, strict=True):
            static.copy_(new)
        recording.graph.replay()
        return recording.outputs

    def warm_up(self, *inputs: Tensor) -> None:
        """Run the function and restore the counters."""
        before = [counter.clone() for counter in self.counters]
        self.function(*inputs)
        for counter, value in zip(self.counters, before, strict=True):
            counter.copy_(value)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        static_inputs = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.warm_up(*static_inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*static_inputs)
        return Recording(static_inputs, graph, outputs)


def captured_verify(model: DeepseekV4ForCausalLM, cache: BackboneCache) -> Captured:
    """Return a verify pass, from int64 tokens [B, L] to streams [B, L, N, D] and logits [B, L, V].

    The caller must make sure that the cache has room for the tokens; a recorded step cannot check it.
    """

    def verify(tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        streams_BLND, hidden_BLD = run_step(model, cache, tokens_BL)
        return streams_BLND, model.lm_head(hidden_BLD)

    return Captured(verify, model, (cache.length_B, cache.written_B))
