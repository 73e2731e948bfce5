"""`backbone.weights=keep`: FP8 and FP4 weights stay in memory as they are stored; a module decodes them when it runs.

transformers computes on the codes themselves with a kernel of the Hugging Face hub, which needs a network, the package
`kernels` and a GPU. Here a quantiser of our own lets it load the codes on any device, and its modules get forwards that
decode their weights to the dtype of the input and use torch's products. A decoded weight lives as long as one product.
"""

# R rows and C columns of a weight, T tokens, D model width, k experts of a token

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8GroupedLinear, FP8Linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4GroupedLinear
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from mtptrain.release.codec import FP4_BLOCK, FP4_GRID, FP8_BLOCK

METHOD = "mtptrain_kept"  # `quant_method` of a loaded config


@register_quantization_config(METHOD)
class KeptConfig(FineGrainedFP8Config):
    """transformers' settings under another method, which finds the quantiser below."""


@register_quantizer(METHOD)
class KeptQuantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantiser on any device, with modules that decode."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Accept every device."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        module: Any  # expert parallelism keeps the forwards of this moment
        for module in model.modules():
            if type(module) in DECODING:
                module.__class__ = DECODING[type(module)]
                object.__setattr__(module, "plain", module.plain_module())  # an attribute, not a part of the module


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights [..., R, C] of stored codes, without waiting for the device.

    `release.codec.decode_fp8` and `decode_fp4` define the values; unlike them, this does not look for damage.

    Args:
        codes: float8_e4m3fn [..., R, C], or int8 [..., R, C / 2] with two FP4 codes to a byte.
        scale: one for each block: [..., ceil(R / 128), ceil(C / 128)] for FP8, [..., R, C / 32] for FP4.
        dtype: of the weights; a release's are exact in bfloat16.
    """
    if codes.dtype == torch.int8:
        grid = torch.tensor([*FP4_GRID, *(-value for value in FP4_GRID)], dtype=dtype, device=codes.device)
        low, high = codes & 0x0F, (codes >> 4) & 0x0F
        values, block = grid[torch.stack([low, high], dim=-1).flatten(-2).int()], FP4_BLOCK
    else:
        values, block = codes.to(dtype), FP8_BLOCK
    scale = scale.to(dtype)
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], dim=-2)[..., : values.shape[-2], :]
    return values.mul_(scale.repeat_interleave(block[1], dim=-1)[..., : values.shape[-1]])


class KeptLinear(FP8Linear):
    """A linear map that decodes its weight."""

    plain: nn.Module

    def plain_module(self) -> nn.Module:
        """Return transformers' module for decoded weights, without any."""
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the decoded weight."""
        weight = decode(self.weight, self.weight_scale_inv, input.dtype)
        return functional_call(self.plain, {"weight": weight}, (input,))


class KeptGroupedLinear(FP8GroupedLinear):
    """A block-diagonal linear map that decodes its weight."""

    plain: nn.Module

    def plain_module(self) -> nn.Module:
        """Return transformers' module for decoded weights, without any."""
        with torch.device("meta"):
            return DeepseekV4GroupedLinear(self.in_features, self.out_features, self.n_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the decoded weight."""
        weight = decode(self.weight, self.weight_scale_inv, x.dtype)
        return functional_call(self.plain, {"weight": weight}, (x,))


class KeptExperts(FP8Experts):
    """Experts that decode their weights."""

    plain: nn.Module

    def plain_module(self) -> nn.Module:
        """Return transformers' module for decoded weights, without any."""
        with torch.device("meta"):
            return DeepseekV4Experts(self.config)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the output [T, D] of tokens [T, D] with routes [T, k]."""
        self.plain.num_experts = self.num_experts  # of this process
        names = ("gate_up_proj", "down_proj")
        weights = {name: self._decoded(name, hidden_states.dtype) for name in names}
        return functional_call(self.plain, weights, (hidden_states, top_k_index, top_k_weights))

    def _decoded(self, name: str, dtype: torch.dtype) -> Tensor:
        codes, scale = getattr(self, name), getattr(self, f"{name}_scale_inv")
        # Gate and up are stored as two weights, each with blocks of its own.
        num_stored = 2 if name == "gate_up_proj" else 1
        parts = zip(codes.chunk(num_stored, dim=-2), scale.chunk(num_stored, dim=-2), strict=True)
        return torch.cat([decode(part, of_part, dtype) for part, of_part in parts], dim=-2)


DECODING: dict[type[nn.Module], type[nn.Module]] = {
    FP8Linear: KeptLinear,
    FP8GroupedLinear: KeptGroupedLinear,
    FP8Experts: KeptExperts,
}
