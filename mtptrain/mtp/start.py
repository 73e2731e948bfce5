"""The start of a training run: the stock head, the initial modules, and the parameters that training may change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.backbone.load import Backbone, BackboneSource
from mtptrain.backbone.placement import layer_tensors
from mtptrain.config import MtpConfig, require
from mtptrain.errors import UserError
from mtptrain.mtp.expert_parallel import exchange_tokens, own_share
from mtptrain.mtp.numerics import Numerics
from mtptrain.mtp.stack import ALL_EXPERTS, MtpStack, Share, fresh_stack, num_modules
from mtptrain.mtp.tensors import EXPERTS, HeadTensors, HeldTensors, build_stack, stored_dtype
from mtptrain.release.modules import ReleasedModules, check_names, from_release, is_release_layout, read_release
from mtptrain.release.names import our_shapes
from mtptrain.release.problems import Problems, is_dspark, refuse_dspark
from mtptrain.release.shards import HEAD_PREFIX
from mtptrain.run.distributed import on_each_rank

SLIDING = "sliding_attention"


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
        elsewhere = backbone.shards.heads_elsewhere()
        hint = (
            f"found {', '.join(elsewhere)}: put a file with the head alone beside the model's; or " if elsewhere else ""
        )
        raise UserError(
            f"backbone.path={backbone.folder}: holds no stock head (mtp.* tensors); {hint}train one with "
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


def stock_head(backbone: Backbone | BackboneSource) -> HeadTensors:
    """Return the head in a backbone's folder; its tensors are read, and in release format decoded, when needed.

    Raises:
        UserError: the folder holds no head or DSpark blocks, or a tensor is missing.
    """
    head = stored_head(backbone)
    refuse_dspark(head.keys(), backbone.config)
    return ReleasedModules(head, backbone.config) if is_release_layout(head.keys()) else HeldTensors(head)


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


def initial_stack(config: MtpConfig, backbone: Backbone, tensors: HeadTensors | None, seed: int) -> MtpStack:
    """Return the modules before training, in the backbone's dtype and on its device; every process must call it.

    A missing module starts as a copy of the one before it; of surplus modules, the first `mtp.depth` are kept. With
    `mtp.experts=expert_parallel` a process reads and holds no experts but its share.

    Args:
        config: mode, depth, `init` and `experts`.
        backbone: the frozen backbone.
        tensors: of the stock head or of a checkpoint; None if `mtp.init` is `fresh` or `backbone`.
        seed: seed of newly initialised weights.

    Raises:
        UserError: on every process: the tensors do not fit or cannot be read, or the backbone has no layer to start
            from.
    """
    share = own_share(config.experts)
    if config.init == "fresh":
        stack = place(fresh_stack(backbone.model, config.depth, seed, share), backbone)
    elif config.init == "backbone":
        stack = stack_from_backbone(backbone.model, config.depth, share)
    else:
        assert tensors is not None
        stack = _stored_stack(config, backbone, tensors, share)
    stack.compute_as(Numerics(zero_first=config.zero_first_embedding))
    if share.count > 1:
        exchange_tokens(stack)
    return stack


def _stored_stack(config: MtpConfig, backbone: Backbone, tensors: HeadTensors, share: Share) -> MtpStack:
    """Return modules of stored tensors; what one process cannot read is an error on all."""
    source, weight, built = f"mtp.init={config.init}", backbone.model.lm_head.weight, list[MtpStack]()

    def build() -> None:
        built.append(build_stack(backbone.config, config.depth, tensors, source, weight, share))

    on_each_rank(build)
    return built[0]


def describe_start(config: MtpConfig, stored: Collection[str] | None) -> dict[str, Any]:
    """Return the description of a start that checkpoints record: `init`, and the number and conversion of its modules.

    Args:
        config: mode, depth and `init`.
        stored: names of the tensors that the modules start from; None if they start from no head.
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
    for module_name, module in stack.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            path = f"{module_name}.{name}"
            is_rounded = tensor.is_floating_point() and "rotary_emb" not in path
            dtype = stored_dtype(path, weight.dtype) if is_rounded else tensor.dtype
            tensor.data = tensor.data.to(weight.device, dtype)  # rounded first: a GPU never holds a head in fp32
    return stack


@torch.no_grad()
def stack_from_backbone(model: DeepseekV4ForCausalLM, depth: int, share: Share = ALL_EXPERTS) -> MtpStack:
    """Return modules with the decoder layer, hc_head and norm of the backbone, in its dtype and on its device.

    Attention, hyper-connections, norms and experts come from its last sliding-window layer; a router's bias that it
    lacks, as a hash layer does, is zero. `h_proj` and `e_proj` pass the state and the token through unchanged, both at
    the RMS size of the backbone's embeddings. So a module starts as one more layer of the backbone that also sees the
    next token.

    Every process of a run must call it.

    Args:
        model: the backbone.
        depth: number of modules; all start alike.
        share: share of the routed experts that the modules hold.

    Raises:
        UserError: the backbone has no sliding-window layer, or its weights are kept quantised.
    """
    number, weight = last_sliding(model.config), model.lm_head.weight
    with layer_tensors(model.model.layers[number], share.count > 1) as layer:
        held = _as_module(layer, model, share)
        missing = our_shapes(model.config).keys() - {name.split(".", 2)[-1] for name in held.tensors}
        if missing:
            raise UserError(
                f"mtp.init=backbone: layer {number} has no {min(missing)} of the module's shape and dtype; set "
                "backbone.weights=dequantize, or mtp.init=fresh"
            )
        return build_stack(model.config, depth, held, "mtp.init=backbone", weight, share)


def _as_module(layer: dict[str, Tensor], model: DeepseekV4ForCausalLM, share: Share) -> HeldTensors:
    """Return the tensors of one module, those of a layer of the backbone as far as they fit.

    Args:
        layer: tensors of the layer, with all experts or with a share of them.
        model: the backbone.
        share: see `layer`.
    """
    tensors = _around_the_layer(model) | {f"layer.{name}": value for name, value in layer.items()}
    is_whole = layer["mlp.gate.weight"].shape[0] == len(layer.get("mlp.experts.down_proj", ()))
    shapes = our_shapes(model.config)
    held = HeldTensors(
        {f"mtp.0.{name}": tensors[name] for name in tensors if name in shapes}, ALL_EXPERTS if is_whole else share
    )
    fitting = {
        name: value
        for name, value in held.tensors.items()
        if held.shapes[name] == shapes[name.split(".", 2)[-1]] and value.is_floating_point() and value.itemsize > 1
    }
    return HeldTensors(fitting, held.share)


def _around_the_layer(model: DeepseekV4ForCausalLM) -> dict[str, Tensor]:
    """Return a module's tensors around its layer: projections that are the identity, norms, and those of the output."""
    config, weight = model.config, model.lm_head.weight
    size = model.model.embed_tokens.weight.float().pow(2).mean().sqrt()
    identity = torch.eye(config.hidden_size, device=weight.device)
    tensors = {f"{name}_proj.weight": identity for name in ("e", "h")}
    tensors |= {f"{name}norm.weight": size.expand(config.hidden_size) for name in ("e", "h")}
    tensors["layer.mlp.gate.e_score_correction_bias"] = size.new_zeros(config.n_routed_experts)
    output = {"hc_head": model.model.hc_head, "norm": model.model.norm}
    return tensors | {f"{name}.{key}": value for name, one in output.items() for key, value in one.state_dict().items()}


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
        return {name for name in names if EXPERTS not in name}
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
