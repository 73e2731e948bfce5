"""One MTP module in plain torch, a transcription of the official formula, in the dtype of the module's tensors."""

# S tokens, X keys, N residual streams, D model width, H heads, C head width

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtptrain.mtp.block import MtpBlock

EPS = 1e-6


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMS norm over the last dimension."""
    normed = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return normed if weight is None else normed * weight


def rotate(x: Tensor, positions: Tensor, rope_dim: int, sign: float = 1.0) -> Tensor:
    """Interleaved RoPE on the last `rope_dim` channels, theta 10,000, as complex products; x is [S, ..., C]."""
    frequencies = 10000.0 ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    angle = sign * positions.double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angle), angle)
    turn = turn.view(len(positions), *[1] * (x.ndim - 2), -1)
    head, tail = x[..., :-rope_dim], x[..., -rope_dim:]
    pairs = torch.complex(tail[..., 0::2].double(), tail[..., 1::2].double()) * turn
    tail = torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([head, tail], dim=-1)


def hyper_mapping(streams: Tensor, hc: nn.Module, iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """pre [S, N], post [S, N] and the doubly stochastic comb [S, N, N] of one hyper-connection."""
    num = streams.shape[1]
    mixes = rms(streams.flatten(1)) @ hc.fn.T
    pre = torch.sigmoid(mixes[:, :num] * hc.scale[0] + hc.base[:num]) + eps
    post = 2 * torch.sigmoid(mixes[:, num : 2 * num] * hc.scale[1] + hc.base[num : 2 * num])
    comb = (mixes[:, 2 * num :] * hc.scale[2] + hc.base[2 * num :]).view(-1, num, num).softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return pre, post, comb


def experts(block: MtpBlock, x: Tensor) -> Tensor:
    """Top-k routed experts by sqrt(softplus) scores with a selection bias, and the shared expert, token by token."""
    moe, config = block.layer.mlp, block.layer.self_attn.config
    limit = config.swiglu_limit

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu((x @ gate.T).clamp(max=limit)) * (x @ up.T).clamp(-limit, limit)) @ down.T

    rows = []
    for token in x:
        scores = F.softplus(token @ moe.gate.weight.T).sqrt()
        chosen = (scores + moe.gate.e_score_correction_bias).topk(config.num_experts_per_tok).indices
        weights = scores[chosen] / scores[chosen].sum() * config.routed_scaling_factor
        row = swiglu(
            token,
            moe.shared_experts.gate_proj.weight,
            moe.shared_experts.up_proj.weight,
            moe.shared_experts.down_proj.weight,
        )
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = moe.experts.gate_up_proj[expert].chunk(2)
            row = row + weight * swiglu(token, gate, up, moe.experts.down_proj[expert])
        rows.append(row)
    return torch.stack(rows)


def queries_and_keys(block: MtpBlock, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [S, H, C] and keys [S, C], which are also the values, rotated to their positions."""
    module, config = block.layer.self_attn, block.layer.self_attn.config
    query = rms(x @ module.q_a_proj.weight.T, module.q_a_norm.weight) @ module.q_b_proj.weight.T
    query = rms(query.view(-1, config.num_attention_heads, config.head_dim))
    key = rms(x @ module.kv_proj.weight.T, module.kv_norm.weight)
    return rotate(query, positions, config.qk_rope_head_dim), rotate(key, positions, config.qk_rope_head_dim)


def attend(block: MtpBlock, query: Tensor, keys: Tensor) -> Tensor:
    """Attention [H, C] of one query [H, C] over some keys [X, C], with a sink a head that takes weight only."""
    scores = query @ keys.T * keys.shape[-1] ** -0.5
    return torch.cat([scores, block.layer.self_attn.sinks[:, None]], dim=-1).softmax(-1)[:, :-1] @ keys


def project(block: MtpBlock, outputs: Tensor, positions: Tensor) -> Tensor:
    """Output of the attention [S, D] from those of its heads [S, H, C], rotated back by the queries' positions."""
    module, config = block.layer.self_attn, block.layer.self_attn.config
    mixed = rotate(outputs, positions, config.qk_rope_head_dim, sign=-1.0)
    groups = mixed.reshape(len(outputs), config.o_groups, -1)
    low_rank = module.o_a_proj.weight.view(config.o_groups, -1, groups.shape[-1])
    return torch.einsum("sgi,goi->sgo", groups, low_rank).flatten(1) @ module.o_b_proj.weight.T


def run_layer(block: MtpBlock, embedding: Tensor, state: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """State [S, N, D] after the module; `attention` maps the layer's normed input [S, D] to its output [S, D]."""
    config = block.layer.self_attn.config
    layer, iterations, eps = block.layer, config.hc_sinkhorn_iters, config.hc_eps
    token = rms(embedding, block.enorm.weight) @ block.e_proj.weight.T
    x = token[:, None] + rms(state, block.hnorm.weight) @ block.h_proj.weight.T
    for hc, norm, sublayer in (
        (layer.attn_hc, layer.input_layernorm, attention),
        (layer.ffn_hc, layer.post_attention_layernorm, lambda y: experts(block, y)),
    ):
        pre, post, comb = hyper_mapping(x, hc, iterations, eps)
        output = sublayer(rms((pre[..., None] * x).sum(1), norm.weight))
        x = post[..., None] * output[:, None] + torch.einsum("sjk,sjd->skd", comb, x)
    return x


def collapse(block: MtpBlock, state: Tensor) -> Tensor:
    """The lm_head's input [S, D]."""
    head, eps = block.hc_head, block.layer.self_attn.config.hc_eps
    gate = torch.sigmoid(rms(state.flatten(1)) @ head.hc_fn.T * head.hc_scale + head.hc_base) + eps
    return rms((gate[..., None] * state).sum(1), block.norm.weight)
