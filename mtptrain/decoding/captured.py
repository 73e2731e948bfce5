"""Steps of a decoding run recorded in CUDA graphs: one launch instead of the hundreds of a small model's step."""

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

WARM_UPS = 2  # libraries and kernels set themselves up in the first runs, which a graph cannot record


class Recording(NamedTuple):
    """A graph with the tensors that it reads its inputs from and writes its outputs to."""

    inputs: list[Tensor]
    graph: torch.cuda.CUDAGraph
    outputs: Any


def can_record(model: DeepseekV4ForCausalLM) -> bool:
    """Whether steps of a backbone can be recorded; why not, on a GPU, is logged once."""
    weight = model.lm_head.weight
    if not weight.is_cuda:
        return False
    reason = why_not_recorded(model, torch.cuda.get_device_capability(weight.device))
    if reason is not None:
        _log_once(f"decoding without CUDA graphs, because {reason}")
    return reason is None


def why_not_recorded(model: DeepseekV4ForCausalLM, capability: tuple[int, int]) -> str | None:
    """Why a graph cannot hold a step of this backbone on a GPU of this compute capability; None where it can.

    Source: torch's products of experts, `GroupedBlas.cpp` of 2.10: bf16 on compute capability 9 and 10 stays on the
    device, everything else asks the device for the sizes of its groups.
    """
    if is_shared(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        return "the backbone is spread over devices or processes"
    dtypes = {weight.dtype for name, weight in model.named_parameters() if ".experts." in name}
    if dtypes != {torch.bfloat16}:
        return f"experts in {', '.join(sorted(map(str, dtypes)))} make torch wait for the device; set precision=bf16"
    if capability[0] not in (9, 10):
        return (
            f"torch has no products of experts for compute capability {capability[0]}.{capability[1]} that never wait"
        )
    return None


@cache
def _log_once(message: str) -> None:
    logging.getLogger("mtptrain.decoding").warning(message)


class Captured:
    """A function of tensors that is recorded when it is first called on a GPU, and replayed; elsewhere it just runs.

    What it returns stays valid until the next call with inputs of the same shapes. Apart from its inputs, the function
    may only read and write tensors that live as long as this, and must not wait for the device.

    Args:
        function: from tensors to anything made of tensors.
        model: the backbone it calls, which `can_record` judges.
        counters: tensors that a call advances. They are put back after each run that only warms up; whatever else such
            a run writes must be written again by the next one, as a rejected draft's slots in a cache are.
    """

    def __init__(
        self, function: Callable[..., Any], model: DeepseekV4ForCausalLM, counters: Sequence[Tensor] = ()
    ) -> None:
        self.function, self.counters = function, counters
        self.records = can_record(model)
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
