"""One MTP module of DeepSeek-V4, built from transformers' layer classes."""

# B rows, S slots, N residual streams, D model width, H heads, C head width, r channel pairs that are rotated

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    DeepseekV4TopKRouter,
)

from mtptrain.backbone.modules import HyperConnection, replace_connections, replace_experts, replace_norms
from mtptrain.kernels.hyper_connection import expand_and_mix
from mtptrain.mtp.numerics import KEY_BLOCK, round_fp8

# (query_BHSC, key_BSC, turn_BSr) -> output_BHSC, rotated back by the turns of the queries, as values are rotated keys
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def block_config(config: DeepseekV4Config) -> DeepseekV4Config:
    """Return the config of the module's single decoder layer: sliding attention without compressor, routed experts."""
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    single.layer_types = ["sliding_attention"]
    single.mlp_layer_types = ["moe"]
    return single


class MtpBlock(nn.Module):
    """Combines a residual state with the next token's embedding and runs one decoder layer on it.

    x = e_proj(enorm(embedding)) over all streams + h_proj(hnorm(state)) per stream; then a V4 decoder layer. Its output
    is the state of the next step, and the draft logits are lm_head(norm(hc_head(state))). Embedding and lm_head are the
    backbone's.

    Args:
        config: config of the backbone.
        num_shares: number of equal shares of the routed experts, of which the module holds one.

    Source: DeepSeek-V4's official inference code; arXiv 2412.19437, section 2.2 (multi-token prediction), with
    hyper-connections.
    """

    def __init__(self, config: DeepseekV4Config, num_shares: int = 1) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        single = block_config(config)
        self.window = config.sliding_window
        self.zeroed_position: int | None = None  # the embedding is zero there; set by `MtpStack.compute_as`
        self.has_fp8_keys = False
        self.enorm = DeepseekV4RMSNorm(width, eps=eps)
        self.hnorm = DeepseekV4RMSNorm(width, eps=eps)
        self.e_proj = nn.Linear(width, width, bias=False)
        self.h_proj = nn.Linear(width, width, bias=False)
        self.layer = _decoder_layer(single, num_shares)
        replace_connections(self.layer, HyperConnection)
        self.hc_head = DeepseekV4HyperHead(single)
        self.norm = DeepseekV4RMSNorm(width, eps=eps)
        self.rotary_emb = DeepseekV4RotaryEmbedding(single)
        replace_norms(self)
        replace_experts(self)

    def combine(self, embedding_BSD: Tensor, state_BSND: Tensor) -> Tensor:
        """Return the decoder layer's input [B, S, N, D]."""
        token_BSD = self.e_proj(self.enorm(embedding_BSD))
        return token_BSD.unsqueeze(2) + self.h_proj(self.hnorm(state_BSND))

    def attention(self, normed_BSD: Tensor, position_BS: Tensor, attend: Attend) -> Tensor:
        """Return the layer's attention output [B, S, D]; `attend` chooses the keys."""
        module = self.layer.self_attn
        angle_BSr = position_BS.unsqueeze(-1) * self.rotary_emb.get_buffer("main_inv_freq").float()
        turn_BSr = torch.polar(torch.ones_like(angle_BSr), angle_BSr)
        query = module.q_b_proj(module.q_a_norm(module.q_a_proj(normed_BSD)))
        query_BSHC = query.unflatten(-1, (module.num_heads, module.head_dim))
        query_BSHC = module.q_b_norm(query_BSHC, turn_BSr.unsqueeze(2))
        key = module.kv_norm(module.kv_proj(normed_BSD), turn_BSr)
        if self.has_fp8_keys:
            plain = key.shape[-1] - 2 * turn_BSr.shape[-1]
            key = torch.cat([round_fp8(key[..., :plain], KEY_BLOCK), key[..., plain:]], dim=-1)
        out_BHSC = attend(query_BSHC.transpose(1, 2), key, turn_BSr)
        grouped = out_BHSC.transpose(1, 2).reshape(*normed_BSD.shape[:2], module.config.o_groups, -1)
        return module.o_b_proj(module.o_a_proj(grouped).flatten(2))

    def forward(self, embedding_BSD: Tensor, state_BSND: Tensor, position_BS: Tensor, attend: Attend) -> Tensor:
        """Run one draft step and return the state [B, S, N, D] for the next.

        Args:
            embedding_BSD: backbone embedding of the token at slot i + k, for step k at anchor i.
            state_BSND: state of the step before; at step 1 the backbone's streams.
            position_BS: RoPE positions, i + k - 1.
            attend: attention of this step's queries and keys; it also selects the visible keys.
        """
        layer = self.layer
        if self.zeroed_position is not None:
            embedding_BSD = embedding_BSD.masked_fill((position_BS == self.zeroed_position).unsqueeze(-1), 0)
        x = self.combine(embedding_BSD, state_BSND)
        post, comb, collapsed, x = layer.attn_hc(x)
        x = expand_and_mix(post, comb, self.attention(layer.input_layernorm(collapsed), position_BS, attend), x)
        post, comb, collapsed, x = layer.ffn_hc(x)
        return expand_and_mix(post, comb, layer.mlp(layer.post_attention_layernorm(collapsed)), x)

    def hidden(self, state_BSND: Tensor) -> Tensor:
        """Return the lm_head's input for the draft logits, [B, S, D]."""
        return self.norm(self.hc_head(state_BSND))


def _decoder_layer(config: DeepseekV4Config, num_shares: int) -> DeepseekV4DecoderLayer:
    """Return a layer with one share of the routed experts and a router over all of them."""
    own = copy.deepcopy(config)
    own.n_routed_experts = config.n_routed_experts // num_shares
    layer = DeepseekV4DecoderLayer(own, 0)
    layer.mlp.gate = DeepseekV4TopKRouter(config)
    return layer
