"""RMS norms of transformers' layers, in the dtype of their input."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm


class Norm(DeepseekV4RMSNorm):
    """transformers' module. Its weight is fp32 in a bf16 model, and in transformers 5.17 so is then what it returns."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The normed input, in its dtype."""
        normed: Tensor = super().forward(hidden_states)
        return normed.to(hidden_states.dtype)


def replace_norms(module: nn.Module) -> None:
    """Make every norm in a module a `Norm`; its tensors and their names stay."""
    for child in module.modules():
        if type(child) is DeepseekV4RMSNorm:
            child.__class__ = Norm
