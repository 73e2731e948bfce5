"""The interface of vLLM's offline engine around a backbone of transformers, with two tensor-parallel ranks.

tests/servers/check_loaders.py holds the interface against vLLM's source.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.load import load_backbone
from mtptrain.config import BackboneConfig
from mtptrain.hidden_cache import vllm_engine


class Worker:
    """A worker of vLLM before it is extended."""

    def __init__(self, rank: int, config: Any, model: Any) -> None:
        self.rank, self.vllm_config, self.model = rank, config, model

    def get_model(self) -> Any:
        return self.model


class ServedModel:
    """`vllm.models.deepseek_v4.nvidia.model.DeepseekV4ForCausalLM`: the names that the extension reads."""

    def __init__(self, channels: int) -> None:
        self.model = SimpleNamespace(hc_dim=channels, hc_head_fn=torch.empty(0), _mtp_hidden_buffer=None)

    def get_mtp_target_hidden_states(self) -> Tensor | None:
        buffer: Tensor | None = self.model._mtp_hidden_buffer
        return buffer


class StandIn:
    """`vllm.LLM`.

    Args:
        backbone: runs the requests.
        fault: what goes wrong: `shifted` by a token, another `layer`, or `split` over two steps.
        rows: most tokens of a step.
    """

    def __init__(self, backbone: DeepseekV4ForCausalLM, fault: str | None = None, rows: int = 64) -> None:
        self.backbone, self.fault = backbone, fault
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=rows),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
        )
        channels = backbone.config.hc_mult * backbone.config.hidden_size
        extended = type("Worker", (Worker, vllm_engine.StreamKeeper), {})
        self.workers = [extended(rank, config, ServedModel(channels)) for rank in range(2)]

    def generate(self, prompts: Iterable[Any], sampling_params: Any = None, *, use_tqdm: bool = True) -> list[Any]:
        assert sampling_params.max_tokens == 1
        for prompt in prompts:
            self._step(torch.tensor([prompt["prompt_token_ids"]]))
        return []

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*json.loads(json.dumps(args))) for worker in self.workers]

    def _step(self, tokens_1T: Tensor) -> None:
        found: list[Tensor] = []
        layer = self.backbone.model.layers[0 if self.fault == "layer" else -1]
        handle = layer.register_forward_hook(lambda _module, _args, output: found.append(output[0].flatten(1)))
        self.backbone.model(input_ids=tokens_1T, use_cache=False)
        handle.remove()
        rows = found[0].roll(1, 0) if self.fault == "shifted" else found[0]
        rows = rows[5:] if self.fault == "split" else rows
        for worker in self.workers:
            worker.model.model._mtp_hidden_buffer[: len(rows)].copy_(rows if worker.rank == 0 else rows * torch.nan)


def install(monkeypatch: pytest.MonkeyPatch, fault: str | None = None, version: str = vllm_engine.VLLM) -> list[Any]:
    """Make the stand-in the installed vLLM, on two GPUs; return the list of the arguments with which it is opened."""
    opened: list[Any] = []

    def start(**options: Any) -> StandIn:
        opened.append(options)
        config = BackboneConfig(path=str(Path(options["model"])))
        model = load_backbone(config, torch.device("cpu"), torch.float32).model
        return StandIn(model, fault, options["max_num_batched_tokens"])

    module = SimpleNamespace(LLM=start, SamplingParams=lambda **values: SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: version)
    monkeypatch.setattr(vllm_engine, "visible_gpus", lambda: 2)
    return opened
