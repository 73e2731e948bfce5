"""Steps of a decoding run recorded in CUDA graphs: one launch instead of the hundreds of a small model's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import run_step
from mtptrain.backbone.placement import is_shared

WARM_UPS = 2  # libraries and kernels set themselves up in the first runs, which a graph cannot record


class Recording(NamedTuple):
    """A graph with the tensors that it reads its inputs from and writes its outputs to."""

    inputs: list[Tensor]
    graph: torch.cuda.CUDAGraph
    outputs: Any


class Captured:
    """A function of tensors that is recorded when it is first called on a GPU, and replayed; elsewhere it just runs.

    What it returns stays valid until the next call with inputs of the same shapes. Apart from its inputs, the function
    may only read and write tensors that live as long as this, and must not wait for the device.

    Args:
        function: from tensors to anything made of tensors.
        model: the backbone it calls; one that is spread over devices or processes cannot be recorded.
        counters: tensors that a call advances. They are put back after each run that only warms up; whatever else such
            a run writes must be written again by the next one, as a rejected draft's slots in a cache are.
    """

    def __init__(
        self, function: Callable[..., Any], model: DeepseekV4ForCausalLM, counters: Sequence[Tensor] = ()
    ) -> None:
        self.function, self.counters = function, counters
        devices = {parameter.device for parameter in model.parameters()}
        self.records = len(devices) == 1 and devices.pop().type == "cuda" and not is_shared(model)
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function returns."""
        if not self.records:
            return self.function(*inputs)
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = self._record(inputs)
        recording = self.recordings[shapes]
        for recorded, new in zip(recording.inputs, inputs, strict=True):
            recorded.copy_(new)
        recording.graph.replay()
        return recording.outputs

    def warm_up(self, *inputs: Tensor) -> None:
        """Run and take the counters back."""
        before = [counter.clone() for counter in self.counters]
        self.function(*inputs)
        for counter, value in zip(self.counters, before, strict=True):
            counter.copy_(value)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        own = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.warm_up(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*own)
        return Recording(own, graph, outputs)


def captured_verify(model: DeepseekV4ForCausalLM, cache: BackboneCache) -> Captured:
    """A verify pass: from int64 tokens [B, L] to streams [B, L, N, D] and logits [B, L, V].

    The cache must have room for the tokens: nothing checks it.
    """

    def verify(tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        streams_BLND, hidden_BLD = run_step(model, cache, tokens_BL)
        return streams_BLND, model.lm_head(hidden_BLD)

    return Captured(verify, model, (cache.length_B, cache.written_B))
