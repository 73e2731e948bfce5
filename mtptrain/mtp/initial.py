"""Where the modules of a head start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtptrain.backbone.load import Backbone
from mtptrain.config import MtpConfig
from mtptrain.errors import UserError
from mtptrain.mtp.from_backbone import stack_from_backbone
from mtptrain.mtp.release import from_release, is_release_layout, read_release
from mtptrain.mtp.release_problems import Problems, is_dspark, refuse_dspark
from mtptrain.mtp.stack import MtpStack, fresh_stack, num_modules, stack_from_tensors

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
