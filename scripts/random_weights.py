"""A backbone and a head of a preset's sizes with random weights, for timings where acceptance is not the question."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import torch
import yaml
from torch import nn

from mtptrain.backbone.build import initialize_routing, model_config
from mtptrain.backbone.frozen import DeepseekV4ForCausalLM
from mtptrain.backbone.modules import replace_experts
from mtptrain.config import ShapeConfig
from mtptrain.errors import UserError
from mtptrain.mtp.stack import MtpStack, fresh_stack


def random_model(
    name: str, layers: int | None, experts: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[DeepseekV4ForCausalLM, MtpStack]:
    """Return a frozen backbone and a head of one module.

    Args:
        name: preset of conf/backbone, whose sizes are taken.
        layers: keep the first layers only; None keeps all.
        experts: routed experts a layer; None keeps the preset's.
        device: of the weights.
        dtype: of the weights, but for those that transformers keeps in float32.

    Raises:
        UserError: there is no such preset.
    """
    preset = files("mtptrain.conf").joinpath("backbone", f"{name}.yaml")
    if not preset.is_file():
        raise UserError(f"--random={name}: conf/backbone holds no such preset")
    shape = ShapeConfig(**yaml.safe_load(preset.read_text(encoding="utf-8")).get("shape", {}))
    shape = replace(
        shape, layer_types=shape.layer_types[:layers], num_experts=shape.num_experts if experts is None else experts
    )
    torch.manual_seed(0)
    with device:
        model = DeepseekV4ForCausalLM(model_config(shape))
        initialize_routing(model, shape)
        stack = fresh_stack(model, 1, seed=0)
    for module in (model, stack):
        _cast(module, dtype)
    replace_experts(model)
    return model.eval().requires_grad_(False), stack.eval().requires_grad_(False)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    kept = (*DeepseekV4ForCausalLM._keep_in_fp32_modules_strict, "e_score_correction_bias")
    for name, parameter in module.named_parameters():
        if not any(part.startswith(kept) for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
