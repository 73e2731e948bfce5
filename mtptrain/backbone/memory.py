"""Whether a GPU has room for its share of a backbone's weights, from the headers of the files alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mtptrain.config import Placement
from mtptrain.errors import UserError
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.run.distributed import world_size

ROUTED, SHARED = ".experts.", ".shared_experts."
CODES = {"F8_E4M3": 1, "I8": 2}  # values in a byte of a quantised weight


class WeightBytes(NamedTuple):
    """Bytes of a backbone's weights in memory: the routed experts, and all others."""

    experts: int
    rest: int


def weight_bytes(shards: Shards, decoded: torch.dtype | None) -> WeightBytes:
    """Return the bytes of the weights, without a head.

    Args:
        shards: tensors of the folder.
        decoded: dtype that quantised weights are decoded to; None keeps them as they are stored.
    """
    experts = rest = 0
    for name, entry in shards.entries.items():
        if name.startswith(HEAD_PREFIX):
            continue
        size = entry.end - entry.begin
        if decoded is not None and entry.dtype in CODES:
            size = math.prod(entry.shape) * CODES[entry.dtype] * decoded.itemsize
        elif decoded is not None and name.endswith(".scale"):
            size = 0
        is_expert = ROUTED in name and SHARED not in name
        experts, rest = experts + size * is_expert, rest + size * (not is_expert)
    return WeightBytes(experts, rest)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU; None for a CPU, whose files can be mapped."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def check_room(
    weights: WeightBytes, placement: Placement, num_experts: int, device: torch.device, is_decoded: bool = False
) -> None:
    """Check, before weights are read, that this process's share fits on its device.

    Args:
        weights: of the whole backbone.
        placement: of the backbone.
        num_experts: routed experts of a layer.
        device: of this process.
        is_decoded: whether quantised weights are decoded, and could be kept as they are stored.

    Raises:
        UserError: it does not fit; gives the figures and the number of GPUs that would do.
    """
    free = free_bytes(device)
    whole, processes = weights.experts + weights.rest, world_size()
    share = {
        Placement.replicate: whole,
        Placement.auto: whole // max(1, torch.cuda.device_count()),
        Placement.zero3: whole // processes,
        Placement.expert_parallel: weights.rest + weights.experts // processes,
    }[placement]
    if free is None or share <= free:
        return
    enough = [
        n for n in range(1, num_experts + 1) if num_experts % n == 0 and weights.rest + weights.experts // n <= free
    ]
    way_out = f"use at least {enough[0]} GPUs with backbone.placement=expert_parallel" if enough else "use larger GPUs"
    raise UserError(
        f"backbone.placement={placement.value}: this process would hold {share / 1e9:.1f} GB of weights "
        f"({whole / 1e9:.1f} GB in all, {weights.experts / 1e9:.1f} GB of them routed experts) and {free / 1e9:.1f} GB "
        f"of its GPU are free; {way_out}{'; backbone.weights=keep takes less' if is_decoded else ''}"
    )
