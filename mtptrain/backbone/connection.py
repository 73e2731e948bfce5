"""Hyper-connections of transformers' layers, computed by our kernels."""

# B rows, S tokens, N residual streams, D model width

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mtptrain.kernels.hyper_connection import Connection, connect


class HyperConnection(DeepseekV4HyperConnection):
    """transformers' module with another way to compute it; called as a module, so that ZeRO gathers its tensors."""

    def forward(self, hidden_streams: Tensor) -> Connection:
        """The weights of every token's connection, and its streams [B, S, N, D] collapsed by them."""
        return connect(
            hidden_streams,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.input_norm.eps,
            eps=self.hc_eps,
            iterations=self.hc_sinkhorn_iters,
        )


def replace_connections(module: nn.Module) -> None:
    """Make every hyper-connection in a module a `HyperConnection`; its tensors and their names stay."""
    for child in module.modules():
        if type(child) is DeepseekV4HyperConnection:
            child.__class__ = HyperConnection
