"""Where the modules of a head start from."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.load import Backbone
from mtptrain.config import MtpConfig
from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack, fresh_stack, num_modules, stack_from_tensors
from mtptrain.release.modules import from_release, is_release_layout, read_release
from mtptrain.release.problems import Problems, is_dspark, refuse_dspark

HEAD = "mtp."


def has_stock(backbone: Backbone) -> bool:
    """Whether the backbone came with an MTP head."""
    head = backbone.shards.only(HEAD)
    return bool(head) and not is_dspark(head.keys(), backbone.config)


def _stock_head(backbone: Backbone) -> Mapping[str, Tensor]:
    """The head in a backbone's folder, as it is stored.

    Raises:
        UserError: there is none.
    """
    head = backbone.shards.only(HEAD)
    if not head:
        raise UserError(
            f"backbone.path={backbone.folder}: holds no stock head (mtp.* tensors); train one with mtp.init=fresh or "
            "mtp.init=backbone, or give a checkpoint's path"
        )
    return head


def stock_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Our `mtp.{d}.*` of the head that came with a backbone, decoded where it lies there as a release stores it.

    Raises:
        UserError: there is none, it is of another kind, or a file is damaged.
    """
    head = _stock_head(backbone)
    refuse_dspark(head.keys(), backbone.config)
    if is_release_layout(head.keys()):
        return from_release(head, backbone.config, torch.float32)
    return dict(head)


def read_stock(backbone: Backbone) -> tuple[dict[str, Tensor], Problems]:
    """`stock_tensors` as far as they can be read, and what is wrong with a release's.

    Raises:
        UserError: there are none.
    """
    head = _stock_head(backbone)
    if is_release_layout(head.keys()):
        return read_release(head, backbone.config, torch.float32)
    return dict(head), Problems()


def initial_stack(config: MtpConfig, backbone: Backbone, tensors: dict[str, Tensor] | None, seed: int) -> MtpStack:
    """The modules before training, in the backbone's dtype and on its device.

    Args:
        config: mode, depth and `init`.
        backbone: the frozen backbone.
        tensors: of the stock head or a checkpoint, where `mtp.init` names one.
        seed: of a fresh start.

    A missing depth copies the one before it; of more modules than are wanted, the first are kept.
    """
    if config.init == "fresh":
        stack = fresh_stack(backbone.model, config.depth, seed)
    elif config.init == "backbone":
        stack = stack_from_backbone(backbone.model, config.depth, seed)
    else:
        assert tensors is not None
        kept = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) < config.depth}
        stack = stack_from_tensors(backbone.config, config.depth, kept, f"mtp.init={config.init}")
    return place(stack, backbone)


def describe_start(config: MtpConfig, stored: dict[str, Tensor] | None) -> dict[str, Any]:
    """What a checkpoint records of its start.

    Args:
        config: mode, depth and `init`.
        stored: the tensors that the modules were made from; None where they came from no head.
    """
    start: dict[str, Any] = {"init": config.init}
    if stored is not None:
        found, wanted = num_modules(stored), config.depth
        start["modules"] = found
        if found < wanted:
            start["conversion"] = f"modules {found}..{wanted - 1} start as copies of module {found - 1}"
        elif found > wanted:
            start["conversion"] = f"modules 0..{wanted - 1} of {found} were kept"
    return start


# What DeepSeek-V4 computes in fp32 whatever the dtype of the matrices; norms are added by name below.
STRICT_FP32 = frozenset({"attn_hc", "ffn_hc", "hc_head", "sinks", "e_score_correction_bias"})


def place(stack: MtpStack, backbone: Backbone) -> MtpStack:
    """Move modules to the backbone's device: matrices in its dtype, the tensors V4 keeps in fp32 in fp32."""
    weight = backbone.model.lm_head.weight
    stack.to(weight.device)
    for module_name, module in stack.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            path = [*module_name.split("."), name]
            is_strict = not STRICT_FP32.isdisjoint(path) or any(part.endswith("norm") for part in path)
            if tensor.is_floating_point() and "rotary_emb" not in path:
                tensor.data = tensor.data.to(torch.float32 if is_strict else weight.dtype)
    return stack


SLIDING = "sliding_attention"


@torch.no_grad()
def stack_from_backbone(model: DeepseekV4ForCausalLM, depth: int, seed: int) -> MtpStack:
    """Modules whose decoder layer, hc_head and norm are the backbone's own, fp32.

    Attention, hyper-connections, norms and experts are those of its last sliding-window layer. The state passes
    through `h_proj` unchanged, at the size that the backbone's streams have there, and the token through `e_proj` at
    the size of its embedding. So a module starts as one more layer of the backbone that is told the next token.

    Args:
        model: the backbone.
        depth: number of modules; all start alike.
        seed: of what the layer does not have, e.g. the router's bias of a hash layer stays at zero.

    Raises:
        UserError: the backbone has no sliding-window layer, or its weights are kept quantised.
    """
    number = _last_sliding(model)
    source = model.model.layers[number].state_dict()
    stack = fresh_stack(model, depth, seed)
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        target = block.layer.state_dict()
        shared = {name: tensor for name, tensor in source.items() if _fits(tensor, target.get(name))}
        lost = [name for name in target if name not in shared and not name.endswith("e_score_correction_bias")]
        if lost:
            raise UserError(
                f"mtp.init=backbone: layer {number} has no {lost[0]} of the module's shape and dtype; set "
                "backbone.weights=dequantize, or mtp.init=fresh"
            )
        block.layer.load_state_dict(shared, strict=False)
        block.hc_head.load_state_dict(model.model.hc_head.state_dict())
        block.norm.load_state_dict(model.model.norm.state_dict())
        _pass_through(block, model)
    return stack


def _last_sliding(model: DeepseekV4ForCausalLM) -> int:
    kinds = model.config.layer_types or []
    sliding = [number for number, kind in enumerate(kinds) if kind == SLIDING]
    if not sliding:
        raise UserError(
            "mtp.init=backbone: this backbone has no sliding-window layer to start from (DeepSeek-V4-Pro has none); "
            "use mtp.init=fresh"
        )
    return sliding[-1]


def _fits(tensor: Tensor, target: Tensor | None) -> bool:
    return target is not None and target.shape == tensor.shape and tensor.is_floating_point() and tensor.itemsize > 1


def _pass_through(block: MtpBlock, model: DeepseekV4ForCausalLM) -> None:
    """Identity projections; the norms give token and state the size of the backbone's embeddings."""
    size = model.model.embed_tokens.weight.float().pow(2).mean().sqrt()
    for projection in (block.e_proj, block.h_proj):
        nn.init.eye_(projection.weight)
    for norm in (block.enorm, block.hnorm):
        norm.weight.fill_(size)


EXPERTS = "*.mlp.experts.*"  # the routed experts: all but a fortieth of V4-Flash's head


def freeze_untrained(stack: MtpStack, trainable: str) -> None:
    """Freeze what `mtp.trainable` leaves out: no gradient, no master, no state of the optimiser.

    Args:
        stack: the modules.
        trainable: `all`, `no_experts`, or patterns of names, separated by commas, as in `*.e_proj.*,*.h_proj.*`.

    Raises:
        UserError: a pattern fits no tensor.
    """
    names = [name for name, _ in stack.named_parameters()]
    if trainable == "no_experts":
        trained = {name for name in names if not fnmatchcase(name, EXPERTS)}
    else:
        trained = set()
        for pattern in ["*"] if trainable == "all" else trainable.split(","):
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise UserError(
                    f"mtp.trainable={trainable}: {pattern!r} fits no tensor of the head; use all, no_experts, or "
                    f"patterns of names such as {names[0]}"
                )
            trained |= found
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name in trained)
