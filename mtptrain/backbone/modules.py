"""Hyper-connections of transformers' layers, computed by our kernels."""


# B rows, S tokens, N residual streams, D model width

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4RMSNorm

from mtptrain.kernels.hyper_connection import Connection, connect


class HyperConnection(DeepseekV4HyperConnection):
    """transformers' module with another way to compute it; called as a module, so that ZeRO gathers its tensors."""

    def forward(self, hidden_streams: Tensor) -> Connection:  # type: ignore[override]
        """The weights of every token's connection, its streams [B, S, N, D] collapsed by them, and the streams."""
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
    """The same for transformers' own decoder layer, which takes three values and needs no gradient."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """The weights of every token's connection, and its streams [B, S, N, D] collapsed by them."""
        post_BSN, comb_BSNN, collapsed_BSD, _ = super().forward(hidden_streams)
        return post_BSN, comb_BSNN, collapsed_BSD


def replace_connections(module: nn.Module, kind: type[HyperConnection]) -> None:
    """Make every hyper-connection in a module one of ours; its tensors and their names stay."""
    for child in module.modules():
        if type(child) is DeepseekV4HyperConnection:
            child.__class__ = kind


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
