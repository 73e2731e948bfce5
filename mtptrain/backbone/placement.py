"""Distribute the layers of a frozen backbone over the processes of a run.

The token embedding, the final norm and the lm_head stay whole on every process: the draft steps use them outside the
backbone's forward.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import DeepseekV4ForCausalLM

from mtptrain.config import Placement
from mtptrain.errors import UserError
from mtptrain.run.distributed import world_size

IS_SHARED = "_is_shared_by_processes"


def is_shared(model: nn.Module) -> bool:
    """Return whether a forward of this backbone needs every process to take part."""
    return getattr(model, IS_SHARED, False)


def share_backbone(model: DeepseekV4ForCausalLM, placement: Placement, device: torch.device) -> None:
    """Keep this process's share of the layers on its device and drop the rest; every process loaded the whole model.

    Args:
        model: frozen, in CPU memory, since one device may be too small for all of it.
        placement: `zero3` shards every large tensor of a layer and gathers it when the layer runs; `expert_parallel`
            shards the routed experts and sends them the tokens; all others shard nothing.
        device: device of this process.

    Raises:
        UserError: this version of transformers has no expert parallelism, or the number of processes does not divide
            the number of experts.
    """
    if placement is Placement.zero3:
        from mtptrain.run.deepspeed import partition_layers  # importing DeepSpeed takes seconds

        partition_layers(model.model.layers)
    elif placement is Placement.expert_parallel:
        _share_experts(model, device)
    else:
        return
    nn.Module.to(model, device)
    setattr(model, IS_SHARED, True)


def _share_experts(model: DeepseekV4ForCausalLM, device: torch.device) -> None:
    """Apply transformers' plan for the model with its all-to-all exchange, since processes hold different tokens."""
    try:
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError:
        raise UserError(
            "backbone.placement=expert_parallel: this version of transformers has no expert parallelism for models "
            "that hold different tokens; install transformers>=5.23, or set backbone.placement=zero3"
        ) from None
    num_experts, processes = model.config.n_routed_experts, world_size()
    if num_experts % processes:
        raise UserError(
            f"backbone.placement=expert_parallel: {processes} processes do not divide {num_experts} experts; use a "
            "divisor of their number, or backbone.placement=zero3"
        )
    mesh = init_device_mesh(device.type, (processes, 1), mesh_dim_names=("expert", "tensor"))
    names = [name for name, _ in [*model.named_parameters(), *model.named_modules()]]
    plan = {name: style for rule, style in model.ep_plan.items() for name in names if fnmatchcase(name, rule)}
    apply_expert_parallelism(model, mesh["expert"], mesh["tensor"], plan, "all_to_all")
