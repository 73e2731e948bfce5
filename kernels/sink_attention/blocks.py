"""Block sizes of the `sink_attention` kernels on each GPU."""

# B rows, S queries, H heads, C head width

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..launch import Constants


class Blocks(NamedTuple):
    """Block sizes and options of one kernel on one GPU."""

    heads: int  # of a query; models with fewer take 16, the least that a product can have
    keys: int  # at once
    num_warps: int
    num_stages: int

    def options(self) -> Constants:
        """Return the compile options for Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


SMALL = Blocks(16, 16, 8, 1)  # for float32, and for the interpreter, so that few keys make several blocks
# The largest that fit into registers and shared memory with 512 channels in bf16; kernels/README.md lists their usage.
# Chosen with the ahead-of-time compiler of Triton 3.9, 2026-11; not measured on a GPU.
BLOCKS = {
    "forward": {
        "sm_80": Blocks(32, 32, 8, 2),
        "sm_90": Blocks(64, 64, 8, 2),
        "sm_100": Blocks(64, 64, 8, 2),
        "gfx942": Blocks(32, 16, 4, 2),
    },
    "chain_backward": dict.fromkeys(["sm_80", "sm_90", "sm_100", "gfx942"], Blocks(16, 16, 4, 1)),
    "query_backward": {
        "sm_80": Blocks(32, 32, 8, 1),
        "sm_90": Blocks(64, 32, 8, 2),
        "sm_100": Blocks(64, 32, 8, 2),
        "gfx942": Blocks(32, 16, 8, 2),
    },
    "key_backward": {
        "sm_80": Blocks(16, 32, 8, 1),
        "sm_90": Blocks(32, 64, 8, 2),
        "sm_100": Blocks(32, 64, 8, 2),
        "gfx942": Blocks(16, 16, 4, 1),
    },
}
FEW_PROGRAMS = 64  # half of the multiprocessors of an H100 or H200


def choose(kernel: str, query_BHSC: Tensor) -> tuple[dict[str, int], Constants]:
    """Return the size constants of a kernel for these queries, and its compile options.

    Args:
        kernel: a key of `BLOCKS`.
        query_BHSC: the queries.
    """
    batch, num_heads, num_slots, channels = query_BHSC.shape
    target = _target(query_BHSC.device)
    blocks = SMALL if target is None or query_BHSC.element_size() > 2 else BLOCKS[kernel][target]
    # A verify pass has few queries, each of which reads all its keys: use more programs with fewer heads.
    are_few = kernel == "forward" and batch * num_slots * num_heads <= FEW_PROGRAMS * blocks.heads
    heads = 16 if are_few or num_heads < blocks.heads else blocks.heads
    return constants(blocks._replace(heads=heads), channels), blocks.options()


def constants(blocks: Blocks, channels: int) -> dict[str, int]:
    """Return the size constants of a kernel."""
    block_c = max(16, triton.next_power_of_2(channels))
    return {"C": channels, "BLOCK_H": blocks.heads, "BLOCK_N": blocks.keys, "BLOCK_C": block_c}


@cache
def _target(device: torch.device) -> str | None:
    """Return the key of `BLOCKS` for a device; None on a CPU, where Triton is interpreted."""
    if device.type == "cpu":
        return None
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")
