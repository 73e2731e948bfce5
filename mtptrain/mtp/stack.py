"""The trained modules of a head: one that drafts every step, or one a step."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock


class MtpStack(nn.Module):
    """`depth` modules; step k is drafted by module min(k, depth). Tensors are named `mtp.{d}.*`, d from 0.

    Args:
        config: the backbone's.
        depth: number of modules.
    """

    def __init__(self, config: DeepseekV4Config, depth: int) -> None:
        super().__init__()
        self.mtp = nn.ModuleList([MtpBlock(config) for _ in range(depth)])

    @property
    def depth(self) -> int:
        """Number of modules."""
        return len(self.mtp)

    def base_step(self, step: int) -> int:
        """The first step that is drafted by the module of step `step` (both 1-based)."""
        return min(step, self.depth)

    def block(self, step: int) -> MtpBlock:
        """The module that drafts step `step` (1-based)."""
        block = self.mtp[self.base_step(step) - 1]
        assert isinstance(block, MtpBlock)
        return block


def fresh_stack(model: DeepseekV4ForCausalLM, depth: int, seed: int) -> MtpStack:
    """Newly initialised modules for a backbone, as transformers initialises its own layers, fp32."""
    torch.manual_seed(seed)
    stack = MtpStack(model.config, depth)
    for module in stack.modules():
        model._init_weights(module)
    return stack


def num_modules(tensors: Collection[str]) -> int:
    """How many modules `mtp.{d}.*` names belong to."""
    return len({name.split(".")[1] for name in tensors})


def head_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names and fp32 values: which head this is, whatever dtype it is held in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        value = tensors[name].detach().float().cpu() + 0.0  # -0.0 is the same value as 0.0
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def stack_from_tensors(config: DeepseekV4Config, depth: int, tensors: dict[str, Tensor], source: str) -> MtpStack:
    """Modules from stored tensors; a depth that is missing starts as a copy of the one before it.

    Args:
        config: the backbone's.
        depth: number of modules wanted; stored modules beyond it are refused.
        tensors: `mtp.{d}.*`.
        source: where the tensors come from, for the error.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    stored = {int(name.split(".")[1]) for name in tensors}
    found = len(stored)
    if stored != set(range(found)) or not 0 < found <= depth:
        raise UserError(f"{source}: holds MTP modules {sorted(stored)} and mtp.depth={depth} are wanted; set mtp.depth")
    stack = MtpStack(config, found)
    try:
        stack.load_state_dict(tensors)
    except RuntimeError as error:
        summary = " ".join(str(error).split())[:400]
        raise UserError(f"{source}: its MTP tensors do not fit this backbone: {summary}") from None
    for _ in range(depth - found):
        stack.mtp.append(copy.deepcopy(stack.mtp[-1]))
    return stack
