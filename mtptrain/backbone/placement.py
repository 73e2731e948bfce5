"""Distribute the layers of a frozen backbone over the processes of a run.

The token embedding, the final norm and the lm_head stay whole on every process: the draft steps use them outside the
backbone's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import DeepseekV4ForCausalLM

from mtptrain.config import Placement
from mtptrain.errors import UserError
from mtptrain.run.distributed import PASS, announce, world_size

IS_SHARED = "_is_shared_by_processes"


def is_shared(model: nn.Module) -> bool:
    """Return whether a forward of this backbone needs every process to take part."""
    return getattr(model, IS_SHARED, False)


def placement_options(placement: Placement, device: torch.device, num_layers: int) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that send every weight to its device while it is read.

    Args:
        placement: of the backbone.
        device: device of this process.
        num_layers: decoder layers.
    """
    if placement is Placement.zero3:  # whole in CPU memory, since one device may be too small for it
        return {}
    if placement is Placement.auto and device.type == "cuda":
        return {"device_map": spread_layers(num_layers, torch.cuda.device_count())}
    if placement is Placement.expert_parallel:
        from transformers.distributed import DistributedConfig  # not in transformers 5.17

        return {"device_map": {"": device}, "distributed_config": DistributedConfig()}
    return {"device_map": {"": device}}


def spread_layers(num_layers: int, num_devices: int) -> dict[str, int]:
    """Return the GPU of every part of the model: equal blocks of layers, and GPU 0 for all that the draft steps use."""
    around = ("model.embed_tokens", "model.rotary_emb", "model.hc_head", "model.norm", "lm_head")
    layers = {f"model.layers.{number}": number * num_devices // num_layers for number in range(num_layers)}
    return {**dict.fromkeys(around, 0), **layers}


def layer_devices(model: DeepseekV4ForCausalLM) -> list[torch.device]:
    """Return the device of each decoder layer."""
    return [layer.self_attn.sinks.device for layer in model.model.layers]


def check_experts(num_experts: int, setting: str, instead: str) -> None:
    """Check, before any weight is read, that expert parallelism can divide a layer among the processes.

    Args:
        num_experts: routed experts of the layer.
        setting: that chose expert parallelism.
        instead: its value to use otherwise.

    Raises:
        UserError: this version of transformers cannot split experts and exchange tokens, or the number of processes
            does not divide the number of experts.
    """
    if not hasattr(DeepseekV4ForCausalLM, "maybe_distribute_model"):
        raise UserError(
            f"{setting}=expert_parallel: transformers {transformers.__version__} cannot split experts over processes; "
            f"install transformers>=5.24, or set {setting}={instead}"
        )
    if num_experts % world_size():
        raise UserError(
            f"{setting}=expert_parallel: {world_size()} processes do not divide the {num_experts} experts of a layer; "
            f"use a divisor of their number, or {setting}={instead}"
        )


def expert_mesh() -> DeviceMesh:
    """Return all processes as the dimension `expert`, and each alone as the dimension `tensor`; a collective."""
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(device_type, (world_size(), 1), mesh_dim_names=("expert", "tensor"))


def split_experts(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """Replace the experts of a model on the meta device by this process's share, and return the model.

    transformers' plan for the model is applied with its all-to-all exchange, because processes hold different tokens.
    """
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = expert_mesh()
    names = [name for name, _ in [*model.named_parameters(), *model.named_modules()]]
    plan = {name: style for rule, style in model.ep_plan.items() for name in names if fnmatchcase(name, rule)}
    apply_expert_parallelism(model, mesh["expert"], mesh["tensor"], plan, "all_to_all")
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: announce(PASS))
    setattr(model, IS_SHARED, True)
    return model


@torch.no_grad()
def run_experts(model: DeepseekV4ForCausalLM) -> None:
    """Run this process's experts of every layer, in order, on the tokens that rank 0 sends; none are sent from here."""
    weight, config = model.lm_head.weight, model.config
    none_0D = weight.new_empty(0, config.hidden_size)
    routes_0k = torch.empty(0, config.num_experts_per_tok, dtype=torch.int64, device=weight.device)
    for layer in model.model.layers:
        layer.mlp.experts(none_0D, routes_0k, weight.new_empty(routes_0k.shape))


@contextmanager
def layer_tensors(layer: nn.Module, has_own_experts: bool) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a layer, gathered from the processes that share them; every process must enter the block.

    Args:
        layer: of the backbone.
        has_own_experts: experts that expert parallelism has distributed are not gathered.
    """
    from torch.distributed.tensor import DTensor  # importing it takes a tenth of a second

    def _local(value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        return value.to_local() if has_own_experts else value.full_tensor()

    with ExitStack() as stack:
        if any(hasattr(parameter, "ds_tensor") for parameter in layer.parameters()):
            from mtptrain.run.deepspeed import gathered

            stack.enter_context(gathered(layer))
        yield {name: _local(value) for name, value in layer.state_dict().items()}


def partition(model: DeepseekV4ForCausalLM, device: torch.device) -> None:
    """Partition every large tensor of the layers over the processes; a layer is gathered whole when it runs.

    Args:
        model: frozen and whole, in CPU memory, since one device may be too small for it.
        device: device of this process.
    """
    from mtptrain.run.deepspeed import partition_layers  # importing DeepSpeed takes seconds

    partition_layers(model.model.layers)
    nn.Module.to(model, device)
    setattr(model, IS_SHARED, True)
