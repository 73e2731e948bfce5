"""Replacements for two modules of transformers' layers: hyper-connections on our kernels, norms that keep the dtype.

Both replace the class of an existing module, so its tensors and their names stay.
"""

# B rows, S tokens, N residual streams, D model width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4RMSNorm,
    DeepseekV4UnweightedRMSNorm,
)

from mtptrain.kernels.hyper_connection import Connection, connect


class HyperConnection(DeepseekV4HyperConnection):
    """transformers' module on our kernel; still called as a module, so that ZeRO gathers its tensors."""

    def forward(self, hidden_streams: Tensor) -> Connection:  # type: ignore[override]
        """Return each token's connection weights, its streams [B, S, N, D] collapsed by them, and the streams."""
        return connect(
            hidden_streams,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.input_norm.eps,
            eps=self.hc_eps,
            iterations=self.hc_sinkhorn_iters,
        )


class FrozenHyperConnection(HyperConnection):
    """The same for transformers' decoder layer, which expects three values and needs no gradient."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return each token's connection weights, and its streams [B, S, N, D] collapsed by them."""
        post_BSN, comb_BSNN, collapsed_BSD, _ = super().forward(hidden_streams)
        return post_BSN, comb_BSNN, collapsed_BSD


def replace_connections(module: nn.Module, kind: type[HyperConnection]) -> None:
    """Turn every hyper-connection of a module into a `kind`."""
    for child in module.modules():
        if type(child) is DeepseekV4HyperConnection:
            child.__class__ = kind


class Norm(DeepseekV4RMSNorm):
    """transformers' module in one call, with the input's dtype: in transformers 5.17 an fp32 weight makes it fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normed input, computed in float32, in its dtype."""
        weight = self.weight.float()
        normed = F.rms_norm(hidden_states.float(), weight.shape, weight, self.variance_epsilon)
        return normed.to(hidden_states.dtype)


class UnweightedNorm(DeepseekV4UnweightedRMSNorm):
    """transformers' module in one call; it rounds once, not twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed input, in its dtype."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


NORMS: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV4RMSNorm: Norm,
    DeepseekV4UnweightedRMSNorm: UnweightedNorm,
}


def replace_norms(module: nn.Module) -> None:
    """Turn every norm of a module into ours."""
    for child in module.modules():
        child.__class__ = NORMS.get(type(child), type(child))
