"""Decoding steps recorded in CUDA graphs: one launch instead of the hundreds that a small model's step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.placement import is_shared
from mtptrain.backbone.traced import TensorFunction, log_once

WARM_UPS = 2  # libraries and kernels initialise in their first runs, and a graph cannot record that


class Recording(NamedTuple):
    """A CUDA graph with its static input and output tensors."""

    inputs: list[Tensor]
    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


def can_record(model: DeepseekV4ForCausalLM) -> bool:
    """Return whether steps of the backbone can be recorded; on a GPU, log once the reason if not."""
    weight = model.lm_head.weight
    if not weight.is_cuda:
        return False
    reason = recording_obstacle(model, torch.cuda.get_device_capability(weight.device))
    if reason is not None:
        log_once(f"decoding without CUDA graphs, because {reason}")
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


class Captured:
    """A function of tensors that is recorded by its first call on a GPU and then replayed.

    A result stays valid until the next call with inputs of the same shapes. Apart from its inputs, the function may
    only read and write tensors that live as long as this object, and must not wait for the device.

    Args:
        function: maps tensors to a tuple of tensors.
        counters: tensors that a call advances. They are restored after each warm-up run. Anything else that a warm-up
            run writes must be written again by the next run, as the cache slots of a rejected draft are.
    """

    is_static, records_first = True, True

    def __init__(self, function: TensorFunction, counters: Sequence[Tensor] = ()) -> None:
        self.function, self.counters = function, counters
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's result."""
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
