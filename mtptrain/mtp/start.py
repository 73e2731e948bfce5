"""The start of a training run: the stock head, the initial modules, and the parameters that training may change."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.backbone.load import Backbone, BackboneSource
from mtptrain.backbone.placement import whole_tensors
from mtptrain.config import MtpConfig, require
from mtptrain.errors import UserError
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.numerics import Numerics
from mtptrain.mtp.stack import MtpStack, fresh_stack, num_modules, stack_from_tensors
from mtptrain.release.modules import check_names, from_release, is_release_layout, read_release
from mtptrain.release.problems import Problems, is_dspark, refuse_dspark
from mtptrain.release.shards import HEAD_PREFIX

# Tensors that DeepSeek-V4 computes in fp32 in any dtype of the matrices; `place` adds the norms by name.
STRICT_FP32 = frozenset({"attn_hc", "ffn_hc", "hc_head", "sinks", "e_score_correction_bias"})
SLIDING = "sliding_attention"
EXPERTS = "*.mlp.experts.*"  # the routed experts, all but 1/40 of V4-Flash's head


def has_stock(backbone: Backbone | BackboneSource) -> bool:
    """Return whether the backbone's folder holds an MTP head."""
    head = backbone.shards.only(HEAD_PREFIX)
    return bool(head) and not is_dspark(head.keys(), backbone.config)


def stored_head(backbone: Backbone | BackboneSource) -> Mapping[str, Tensor]:
    """Return the stored tensors of the head in a backbone's folder, each read when it is needed.

    Raises:
        UserError: the folder holds no head.
    """
    head = backbone.shards.only(HEAD_PREFIX)
    if not head:
        found = backbone.shards.heads_elsewhere()
        told = f"found {', '.join(found)}: put a file with the head alone beside the model's; or " if found else ""
        raise UserError(
            f"backbone.path={backbone.folder}: holds no stock head (mtp.* tensors); {told}train one with "
            "mtp.init=fresh or mtp.init=backbone, or give a checkpoint's path"
        )
    return head


def check_stock(source: BackboneSource) -> None:
    """Refuse a missing or incomplete stock head, or DSpark blocks, by the names of its tensors.

    Raises:
        UserError: says what the folder holds.
    """
    head = stored_head(source)
    refuse_dspark(head.keys(), source.config)
    if is_release_layout(head.keys()):
        check_names(head, source.config)


def check_start(config: MtpConfig, source: BackboneSource, is_kept: bool) -> None:
    """Refuse a start or a choice of trained tensors that this backbone does not have, before its weights are read.

    Args:
        config: the modules; the checkpoint that `init` may name is not looked at.
        source: the backbone.
        is_kept: whether its weights stay quantised in memory.

    Raises:
        UserError: there is no stock head, no layer to start from, or no tensor of a name.
    """
    if config.init == "stock":
        check_stock(source)
    if config.init == "backbone":
        last_sliding(source.config)
        rule = "copies a layer, and its weights stay quantised; set backbone.weights=dequantize, or mtp.init=fresh"
        require(not is_kept, "mtp.init", "backbone", rule)
    with torch.device("meta"):
        names = [name for name, _ in MtpStack(source.config, config.depth).named_parameters()]
    trained_names(names, config.trainable)


def stock_tensors(backbone: Backbone | BackboneSource) -> dict[str, Tensor]:
    """Return our `mtp.{d}.*` of the head in a backbone's folder; a head in release format is decoded to fp32.

    Raises:
        UserError: the folder holds no head or DSpark blocks, or a file is damaged.
    """
    head = stored_head(backbone)
    refuse_dspark(head.keys(), backbone.config)
    if is_release_layout(head.keys()):
        return from_release(head, backbone.config, torch.float32)
    return dict(head)


def read_stock(backbone: Backbone) -> tuple[dict[str, Tensor], Problems]:
    """Return the readable part of `stock_tensors`, and the problems of a head in release format.

    Raises:
        UserError: the folder holds no head.
    """
    head = stored_head(backbone)
    if is_release_layout(head.keys()):
        return read_release(head, backbone.config, torch.float32)
    return dict(head), Problems()


def initial_stack(config: MtpConfig, backbone: Backbone, tensors: dict[str, Tensor] | None, seed: int) -> MtpStack:
    """Return the modules before training, in the backbone's dtype and on its device.

    A missing module starts as a copy of the one before it; of surplus modules, the first `mtp.depth` are kept.

    Args:
        config: mode, depth and `init`.
        backbone: the frozen backbone.
        tensors: tensors of the stock head or of a checkpoint; None if `mtp.init` is `fresh` or `backbone`.
        seed: seed of newly initialised weights.

    Raises:
        UserError: the tensors do not fit, or the backbone has no layer to start from.
    """
    if config.init == "fresh":
        stack = fresh_stack(backbone.model, config.depth, seed)
    elif config.init == "backbone":
        stack = stack_from_backbone(backbone.model, config.depth, seed)
    else:
        assert tensors is not None
        kept = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) < config.depth}
        stack = stack_from_tensors(backbone.config, config.depth, kept, f"mtp.init={config.init}")
    stack.compute_as(Numerics(zero_first=config.zero_first_embedding))
    return place(stack, backbone)


def describe_start(config: MtpConfig, stored: dict[str, Tensor] | None) -> dict[str, Any]:
    """Return the description of a start that checkpoints record: `init`, and the number and conversion of its modules.

    Args:
        config: mode, depth and `init`.
        stored: the head that the modules start from; None if they start from no head.
    """
    start: dict[str, Any] = {"init": config.init}
    if stored is not None:
        num_stored, depth = num_modules(stored), config.depth
        start["modules"] = num_stored
        if num_stored < depth:
            start["conversion"] = f"modules {num_stored}..{depth - 1} start as copies of module {num_stored - 1}"
        elif num_stored > depth:
            start["conversion"] = f"modules 0..{depth - 1} of {num_stored} were kept"
    return start


def place(stack: MtpStack, backbone: Backbone) -> MtpStack:
    """Move modules to the backbone's device and dtype; tensors that V4 keeps in fp32 become fp32."""
    weight = backbone.model.lm_head.weight
    stack.to(weight.device)
    for module_name, module in stack.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            path = [*module_name.split("."), name]
            is_strict = not STRICT_FP32.isdisjoint(path) or any(part.endswith("norm") for part in path)
            if tensor.is_floating_point() and "rotary_emb" not in path:
                tensor.data = tensor.data.to(torch.float32 if is_strict else weight.dtype)
    return stack


@torch.no_grad()
def stack_from_backbone(model: DeepseekV4ForCausalLM, depth: int, seed: int) -> MtpStack:
    """Return modules with the decoder layer, hc_head and norm of the backbone, fp32.

    Attention, hyper-connections, norms and experts come from its last sliding-window layer. `h_proj` and `e_proj` pass
    the state and the token through unchanged, both at the RMS size of the backbone's embeddings. So a module starts as
    one more layer of the backbone that also sees the next token.

    Every process of a run must call it.

    Args:
        model: the backbone.
        depth: number of modules; all start alike.
        seed: seed of tensors that the layer lacks; the router's bias of a hash layer, for one, stays at zero.

    Raises:
        UserError: the backbone has no sliding-window layer, or its weights are kept quantised.
    """
    number = last_sliding(model.config)
    source = whole_tensors(model.model.layers[number])
    stack = fresh_stack(model, depth, seed)
    for block in stack.mtp:
        assert isinstance(block, MtpBlock)
        target = block.layer.state_dict()
        shared = {name: tensor for name, tensor in source.items() if _fits(tensor, target.get(name))}
        missing = [name for name in target if name not in shared and not name.endswith("e_score_correction_bias")]
        if missing:
            raise UserError(
                f"mtp.init=backbone: layer {number} has no {missing[0]} of the module's shape and dtype; set "
                "backbone.weights=dequantize, or mtp.init=fresh"
            )
        block.layer.load_state_dict(shared, strict=False)
        block.hc_head.load_state_dict(model.model.hc_head.state_dict())
        block.norm.load_state_dict(model.model.norm.state_dict())
        _pass_through(block, model)
    return stack


def last_sliding(config: DeepseekV4Config) -> int:
    """Return the number of the last sliding-window layer.

    Raises:
        UserError: there is none.
    """
    kinds = config.layer_types or []
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
    """Set the projections to the identity, and the norms to the RMS size of the backbone's embeddings."""
    size = model.model.embed_tokens.weight.float().pow(2).mean().sqrt()
    for projection in (block.e_proj, block.h_proj):
        nn.init.eye_(projection.weight)
    for norm in (block.enorm, block.hnorm):
        norm.weight.fill_(size)


def freeze_untrained(stack: MtpStack, trainable: str) -> None:
    """Freeze the parameters that `mtp.trainable` leaves out: no gradient, no fp32 master, no optimiser state.

    Args:
        stack: the modules.
        trainable: `all`, `no_experts`, or name patterns separated by commas, such as `*.e_proj.*,*.h_proj.*`.

    Raises:
        UserError: a pattern matches no tensor.
    """
    trained = trained_names([name for name, _ in stack.named_parameters()], trainable)
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name in trained)


def trained_names(names: list[str], trainable: str) -> set[str]:
    """Return the names that `mtp.trainable` chooses of those of a head's parameters.

    Raises:
        UserError: a pattern matches no name.
    """
    if trainable == "no_experts":
        return {name for name in names if not fnmatchcase(name, EXPERTS)}
    trained: set[str] = set()
    for pattern in ["*"] if trainable == "all" else trainable.split(","):
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise UserError(
                f"mtp.trainable={trainable}: {pattern!r} fits no tensor of the head; use all, no_experts, or patterns "
                f"of names such as {names[0]}"
            )
        trained |= matches
    return trained
