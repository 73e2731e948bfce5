"""The tensors of a head, read one at a time, and modules that are built from them without a second copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock, block_config
from mtptrain.mtp.stack import ALL_EXPERTS, MtpStack, Share, check_shapes, count_modules
from mtptrain.release.names import our_shapes

# Tensors that DeepSeek-V4 computes in fp32 in any dtype of the matrices; `stored_dtype` adds the norms by name.
STRICT_FP32 = frozenset({"attn_hc", "ffn_hc", "hc_head", "sinks", "e_score_correction_bias"})
EXPERTS = ".mlp.experts."  # in the names of stacks of routed experts


class HeadTensors(Protocol):
    """The tensors `mtp.{d}.*` of a head, read when they are needed."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, whole."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor; do not write to it."""

    def expert(self, name: str, number: int) -> Tensor:
        """Return one expert of a stack of experts; do not write to it."""


class HeldTensors:
    """Tensors of a head in memory, or mapped from files in the layout of this package.

    Args:
        tensors: `mtp.{d}.*`.
        share: share of the experts that their stacks hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor], share: Share = ALL_EXPERTS) -> None:
        self.tensors, self.share = tensors, share

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, whole."""
        return {name: self._shape(name, tuple(self.tensors[name].shape)) for name in self.tensors}

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return self.tensors[name]

    def expert(self, name: str, number: int) -> Tensor:
        """Return one expert of a stack of experts."""
        stack = self.tensors[name]
        return stack[number - self.share.number * len(stack)]

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.share.count * shape[0], *shape[1:]) if EXPERTS in name else shape


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor of a head whose matrices have `dtype`: fp32 for those that V4 keeps in fp32."""
    path = name.split(".")
    is_strict = not STRICT_FP32.isdisjoint(path) or any(part.endswith("norm") for part in path)
    return torch.float32 if is_strict else dtype


def build_stack(
    config: DeepseekV4Config,
    depth: int,
    tensors: HeadTensors,
    source: str,
    weight: Tensor,
    share: Share = ALL_EXPERTS,
) -> MtpStack:
    """Return modules that are filled tensor by tensor; a missing module starts as a copy of the one before it.

    Beside the modules, memory holds one tensor at a time, and one expert of a stack of experts.

    Args:
        config: config of the backbone.
        depth: number of modules; of surplus modules, the first `depth` are kept.
        tensors: of the head.
        source: origin of the tensors, for the error.
        weight: any matrix of the backbone; the modules get its dtype and its device.
        share: share of the routed experts that the modules hold.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, or cannot be read.
    """
    shapes = {name: shape for name, shape in tensors.shapes.items() if int(name.split(".")[1]) < depth}
    last = count_modules(shapes, depth, source) - 1
    _check_names(shapes, last + 1, config, source)
    with torch.device("meta"):
        stack = MtpStack(config, depth, share.count)
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        block.rotary_emb = DeepseekV4RotaryEmbedding(block_config(config)).to(weight.device)  # in no file
    own = share.experts(config.n_routed_experts)
    for name, empty in stack.state_dict().items():
        module, rest = name.split(".", 2)[1:]
        value = torch.empty(empty.shape, dtype=stored_dtype(name, weight.dtype), device=weight.device)
        _read(value, tensors, f"mtp.{min(int(module), last)}.{rest}", own)
        stack.load_state_dict({name: value}, strict=False, assign=True)
    return stack


def _read(value: Tensor, tensors: HeadTensors, name: str, own: range) -> None:
    """Copy a stored tensor, or this process's experts of it, into `value`."""
    if EXPERTS not in name:
        value.copy_(tensors[name])
        return
    for target, number in zip(value, own, strict=True):
        target.copy_(tensors.expert(name, number))


def _check_names(
    shapes: Mapping[str, tuple[int, ...]], num_modules: int, config: DeepseekV4Config, source: str
) -> None:
    """Refuse tensors that are missing, unexpected or of another backbone in the first modules."""
    check_shapes(shapes, config, source)
    expected = {f"mtp.{number}.{name}" for number in range(num_modules) for name in our_shapes(config)}
    for problem, names in (("missing", expected - shapes.keys()), ("unexpected", shapes.keys() - expected)):
        if names:
            raise UserError(
                f"{source}: its MTP tensors do not fit this backbone: {len(names)} {problem}, e.g. {min(names)}"
            )
