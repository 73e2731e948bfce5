"""Where the modules of a head start from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtptrain.backbone.load import Backbone
from mtptrain.config import MtpConfig
from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack, fresh_stack, stack_from_tensors


def mtp_tensors(folder: Path) -> dict[str, Tensor]:
    """The `mtp.*` tensors that lie in a backbone's folder, possibly none.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("mtp.")]  # noqa: SIM118 - not a dict
                found.update({name: file.get_tensor(name) for name in names})
        except (SafetensorError, OSError) as error:
            raise UserError(f"backbone.path={folder}: {path.name} cannot be read ({error}); restore the file") from None
    return found


def stock_tensors(folder: Path) -> dict[str, Tensor]:
    """The `mtp.*` tensors of the head that came with a backbone.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    found = mtp_tensors(folder)
    if not found:
        raise UserError(
            f"backbone.path={folder}: holds no stock head (mtp.* tensors); train one with mtp.init=fresh, or give a "
            "checkpoint's path"
        )
    return found


def initial_stack(config: MtpConfig, backbone: Backbone, tensors: dict[str, Tensor] | None, seed: int) -> MtpStack:
    """The modules before training, in the backbone's dtype and on its device.

    Args:
        config: mode, depth and `init`.
        backbone: the frozen backbone.
        tensors: the checkpoint's, where `mtp.init` is a path; a missing depth copies the one before it.
        seed: of a fresh start.
    """
    if config.init == "fresh":
        stack = fresh_stack(backbone.model, config.depth, seed)
    else:
        source = f"mtp.init={config.init}"
        stack = stack_from_tensors(backbone.config, config.depth, tensors or stock_tensors(backbone.folder), source)
    return place(stack, backbone)


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
