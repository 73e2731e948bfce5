"""Replacements for modules of transformers' layers: hyper-connections and norms on our kernels, experts in few calls.

They replace the class of an existing module, so its tensors and their names stay.
"""

# B rows, S tokens, N residual streams, D model width, T tokens, k experts of a token, I width of an expert

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4HyperConnection,
    DeepseekV4RMSNorm,
    DeepseekV4UnweightedRMSNorm,
)

from mtptrain.kernels.hyper_connection import Connection, connect
from mtptrain.kernels.norm_rotate import norm_and_rotate, rms_norm, rotate_, runs_triton

# Limits to computing all experts for all tokens: weights of a layer's experts, and multiplications.
MOST_WEIGHTS = 2**19  # 2 MiB of float32, which a core's cache holds; layers of tiny have 0.2 M
MOST_PRODUCTS = 2**24  # 85 tokens of tiny


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

    def forward(self, hidden_states: Tensor, turn: Tensor | None = None) -> Tensor:
        """Return the normed input, computed in float32, in its dtype.

        Args:
            hidden_states: [..., C].
            turn: complex64 [..., r], broadcast; rotates the last 2r channels of the result.
        """
        if turn is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return norm_and_rotate(hidden_states, turn, self.weight, eps=self.variance_epsilon)


class UnweightedNorm(DeepseekV4UnweightedRMSNorm):
    """transformers' module in one call; it rounds once, not twice."""

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """Return the normed input, in its dtype; arguments as those of `Norm`."""
        return rms_norm(x, None, self.eps) if turn is None else norm_and_rotate(x, turn, eps=self.eps)


def norm_and_rotate_(norm: nn.Module, x: Tensor, turn: Tensor) -> Tensor:
    """Return `norm(x, turn)`; without Triton the rotation is in place, for a caller that needs no gradient."""
    rotated: Tensor = norm(x, turn) if runs_triton(x) else rotate_(norm(x), turn)
    return rotated


NORMS: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV4RMSNorm: Norm,
    DeepseekV4UnweightedRMSNorm: UnweightedNorm,
}


def replace_norms(module: nn.Module) -> None:
    """Turn every norm of a module into ours."""
    for child in module.modules():
        child.__class__ = NORMS.get(type(child), type(child))


class Experts(DeepseekV4Experts):
    """transformers' module, which computes all experts for all tokens where that is little work.

    Calls and copies decide there: `scripts/benchmark_engine.py` times the passes.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, [T, D]."""
        if torch.is_grad_enabled() or not self._is_little(len(hidden_states)):
            out_TD: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return out_TD
        num_tokens, num_experts = len(hidden_states), len(self.gate_up_proj)
        weights_TE = top_k_weights.new_zeros(num_tokens, num_experts).scatter_add_(1, top_k_index, top_k_weights)
        gate, up = (hidden_states @ self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        inner = self.act_fn(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)
        out_ETD = (inner @ self.down_proj.transpose(1, 2)) * weights_TE.T.unsqueeze(-1)
        return out_ETD.sum(0).to(hidden_states.dtype)

    def _is_little(self, num_tokens: int) -> bool:
        size = self.gate_up_proj.numel() + self.down_proj.numel()
        return size <= MOST_WEIGHTS and num_tokens * size <= MOST_PRODUCTS


def replace_experts(module: nn.Module) -> None:
    """Turn the routed experts of a module into `Experts`; quantised ones stay as they are."""
    for child in module.modules():
        if type(child) is DeepseekV4Experts:
            child.__class__ = Experts
