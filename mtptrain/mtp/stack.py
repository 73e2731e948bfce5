"""The trained modules of a head: one module for every step, or a module for each step."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4RotaryEmbedding

from mtptrain.config.backbone import BACKBONE_CHOICE
from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock, block_config
from mtptrain.mtp.numerics import AS_TRAINED, Numerics, round_activations
from mtptrain.release.names import our_shapes


@dataclass(frozen=True, slots=True)
class Share:
    """Share `number`, from 0, of `count` equal shares of the routed experts of a head."""

    number: int = 0
    count: int = 1

    def experts(self, num_experts: int) -> range:
        """Return the numbers of its experts, of `num_experts`."""
        size = num_experts // self.count
        return range(self.number * size, (self.number + 1) * size)


ALL_EXPERTS = Share()


class MtpStack(nn.Module):
    """`depth` modules, of which number min(k, depth) drafts step k. Tensors are named `mtp.{d}.*`, d from 0.

    Args:
        config: config of the backbone.
        depth: number of modules, at least 1.
        num_shares: number of equal shares of the routed experts, of which the modules hold one.
    """

    def __init__(self, config: DeepseekV4Config, depth: int, num_shares: int = 1) -> None:
        super().__init__()
        self.mtp = nn.ModuleList([MtpBlock(config, num_shares) for _ in range(depth)])
        self.numerics = AS_TRAINED

    def compute_as(self, numerics: Numerics) -> None:
        """Compute with the numerics of a server, or of a training, from now on.

        Module d sees anchor 0 at position d in its base step, where a server that zeroes the embedding does so for
        every module.
        """
        self.numerics = numerics
        for number, block in enumerate(self.mtp):
            assert isinstance(block, MtpBlock)
            block.zeroed_position = number if numerics.zero_first else None
            block.has_fp8_keys = numerics.fp8_keys
            round_activations(block, numerics.fp8_activations)

    @property
    def depth(self) -> int:
        """Number of modules."""
        return len(self.mtp)

    def base_step(self, step: int) -> int:
        """Return the first step that the module of step `step` drafts (both 1-based)."""
        return min(step, self.depth)

    def block(self, step: int) -> MtpBlock:
        """Return the module that drafts step `step` (1-based)."""
        block = self.mtp[self.base_step(step) - 1]
        assert isinstance(block, MtpBlock)
        return block


def fresh_stack(model: DeepseekV4ForCausalLM, depth: int, seed: int, share: Share = ALL_EXPERTS) -> MtpStack:
    """Return newly initialised modules for a backbone, fp32, with the initialisation of transformers' layers.

    A share of the experts has the numbers that they have in a whole head of the same seed.
    """
    torch.manual_seed(seed)
    stack = MtpStack(model.config, depth, share.count)
    for module in stack.modules():
        if share.count > 1 and isinstance(module, DeepseekV4Experts):
            _draw_experts(module, share, model.config)
        else:
            model._init_weights(module)
    return stack


@torch.no_grad()
def _draw_experts(experts: DeepseekV4Experts, share: Share, config: DeepseekV4Config) -> None:
    """Draw the numbers of all experts as transformers does, some at a time, and keep those of a share.

    torch turns 16 uniform numbers at once into normal ones, so pieces have a multiple of 16 values.
    """
    own = share.experts(config.n_routed_experts)
    for kept in (experts.gate_up_proj, experts.down_proj):
        drawn = kept.new_empty(16 // math.gcd(kept[0].numel(), 16), *kept.shape[1:])
        for start in range(0, config.n_routed_experts, len(drawn)):
            piece = range(start, min(start + len(drawn), config.n_routed_experts))
            drawn[: len(piece)].normal_(std=config.initializer_range)
            for number in set(piece) & set(own):
                kept[number - own.start] = drawn[number - start]


def num_modules(tensors: Collection[str]) -> int:
    """Return the number of modules that `mtp.{d}.*` names belong to."""
    return len({name.split(".")[1] for name in tensors})


def pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Return the experts of a stack of experts, and any other tensor whole."""
    return tensor if tensor.ndim > 2 else [tensor]


def head_digest(tensors: Mapping[str, Tensor], cut: Callable[[Tensor], Iterable[Tensor]] = pieces) -> str:
    """Return a hex SHA-256 over names and fp32 values, which identifies a head in any dtype.

    Args:
        tensors: `mtp.{d}.*`.
        cut: returns consecutive pieces of a tensor, which are read one at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for piece in cut(tensors[name]):
            value = piece.detach().float().cpu() + 0.0  # -0.0 equals 0.0
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: DeepseekV4Config, source: str) -> None:
    """Refuse tensors of another backbone by their shapes, which files state in their headers.

    Args:
        shapes: of `mtp.{d}.*`.
        config: config of the backbone.
        source: origin of the tensors, for the error.

    Raises:
        UserError: names the first tensor of another shape.
    """
    expected = our_shapes(config)
    for name, shape in shapes.items():
        fitting = expected.get(name.split(".", 2)[-1])
        if fitting is not None and tuple(shape) != fitting:
            raise UserError(
                f"{source}: belongs to another backbone: its {name} is {list(shape)}, and that of a head of this "
                f"backbone is {list(fitting)}; set {BACKBONE_CHOICE} to match"
            )


def count_modules(tensors: Collection[str], depth: int, source: str) -> int:
    """Return the number of stored modules.

    Args:
        tensors: names `mtp.{d}.*`.
        depth: largest number of modules.
        source: origin of the tensors, for the error.

    Raises:
        UserError: the modules are not 0..n with n < depth.
    """
    stored = {int(name.split(".")[1]) for name in tensors}
    if stored != set(range(len(stored))) or not 0 < len(stored) <= depth:
        raise UserError(
            f"mtp.depth={depth}: {source} holds MTP modules {sorted(stored)}; set mtp.depth to their number"
        )
    return len(stored)


def stack_from_tensors(config: DeepseekV4Config, depth: int, tensors: dict[str, Tensor], source: str) -> MtpStack:
    """Return modules of stored tensors, fp32; a missing module starts as a copy of the one before it.

    The modules take fp32 tensors as they are, without a copy: at scale, two heads do not fit in memory.

    Args:
        config: config of the backbone.
        depth: number of modules to build, at least the number stored.
        tensors: `mtp.{d}.*`.
        source: origin of the tensors, for the error.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, or the modules are not 0..n with n < depth.
    """
    num_stored = count_modules(tensors, depth, source)
    with torch.device("meta"):
        stack = MtpStack(config, num_stored)
    for block in stack.mtp:
        block.rotary_emb = DeepseekV4RotaryEmbedding(block_config(config))  # its frequencies are in no file
    try:
        stack.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        summary = " ".join(str(error).split())[:400]
        raise UserError(f"{source}: its MTP tensors do not fit this backbone: {summary}") from None
    for _ in range(depth - num_stored):
        stack.mtp.append(copy.deepcopy(stack.mtp[-1]))
    return stack
