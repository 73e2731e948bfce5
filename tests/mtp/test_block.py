"""The MTP block against a plain-torch transcription of the official formula."""

# S tokens, N residual streams, D model width, H heads, C head width

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mtptrain.config import MtpConfig
from mtptrain.errors import UserError
from mtptrain.kernels.sink_attention import rollout_attention
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import stack_from_tensors
from tests.tiny import random_backbone, random_stack

EPS = 1e-6


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
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


def hyper_mapping(streams: Tensor, hc: torch.nn.Module, iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
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


def attention(block: MtpBlock, x: Tensor, positions: Tensor) -> Tensor:
    """Causal sliding attention with one shared key-value head and a sink a head, over one document."""
    module, config = block.layer.self_attn, block.layer.self_attn.config
    heads, width, rope_dim = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    query = rms(x @ module.q_a_proj.weight.T, module.q_a_norm.weight) @ module.q_b_proj.weight.T
    query = rotate(rms(query.view(-1, heads, width)), positions, rope_dim)
    key = rotate(rms(x @ module.kv_proj.weight.T, module.kv_norm.weight), positions, rope_dim)
    outputs = []
    for i in range(len(x)):
        first = max(0, i - config.sliding_window + 1)
        scores = query[i] @ key[first : i + 1].T * width**-0.5
        weights = torch.cat([scores, module.sinks[:, None]], dim=-1).softmax(-1)[:, :-1]
        outputs.append(weights @ key[first : i + 1])
    mixed = rotate(torch.stack(outputs), positions, rope_dim, sign=-1.0)
    groups = mixed.reshape(len(x), config.o_groups, -1)
    low_rank = module.o_a_proj.weight.view(config.o_groups, -1, groups.shape[-1])
    return torch.einsum("sgi,goi->sgo", groups, low_rank).flatten(1) @ module.o_b_proj.weight.T


def official_block(block: MtpBlock, embedding: Tensor, state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """State [S, N, D] and the lm_head's input [S, D] of one module over one document."""
    config = block.layer.self_attn.config
    layer, iterations, eps = block.layer, config.hc_sinkhorn_iters, config.hc_eps
    token = rms(embedding, block.enorm.weight) @ block.e_proj.weight.T
    x = token[:, None] + rms(state, block.hnorm.weight) @ block.h_proj.weight.T
    for hc, norm, sublayer in (
        (layer.attn_hc, layer.input_layernorm, lambda y: attention(block, y, positions)),
        (layer.ffn_hc, layer.post_attention_layernorm, lambda y: experts(block, y)),
    ):
        pre, post, comb = hyper_mapping(x, hc, iterations, eps)
        output = sublayer(rms((pre[..., None] * x).sum(1), norm.weight))
        x = post[..., None] * output[:, None] + torch.einsum("sjk,sjd->skd", comb, x)
    head = block.hc_head
    gate = torch.sigmoid(rms(x.flatten(1)) @ head.hc_fn.T * head.hc_scale + head.hc_base) + eps
    return x, rms((gate[..., None] * x).sum(1), block.norm.weight)


@pytest.mark.parametrize("length", [1, 7, 21])
def test_block_equals_a_transcription_of_the_official_formula(length: int) -> None:
    model = random_backbone()
    block = random_stack(model).block(1)
    generator = torch.Generator().manual_seed(length)
    embedding = torch.randn(length, model.config.hidden_size, generator=generator)
    state = torch.randn(length, model.config.hc_mult, model.config.hidden_size, generator=generator)
    positions = torch.arange(length)

    def attend(query_BHSC: Tensor, key_BSC: Tensor) -> Tensor:
        module, start_BS = block.layer.self_attn, torch.zeros(1, length, dtype=torch.int64)
        return rollout_attention(
            query_BHSC, key_BSC, None, module.sinks, start_BS, window=block.window, scale=module.scaling
        )

    with torch.no_grad():
        ours = block(embedding[None], state[None], positions[None], attend)
        state_expected, hidden_expected = official_block(block, embedding, state, positions)
        # Two orders of fp32 sums over a layer whose activations are of order 10.
        torch.testing.assert_close(ours[0], state_expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(block.hidden(ours)[0], hidden_expected, atol=2e-4, rtol=2e-4)


def test_missing_depths_start_as_copies_of_the_last_one() -> None:
    model = random_backbone()
    tensors = random_stack(model, depth=1).state_dict()
    grown = stack_from_tensors(model.config, 3, tensors, "test")
    for depth in (1, 2):
        for name, tensor in grown.mtp[depth].state_dict().items():
            assert torch.equal(tensor, tensors[f"mtp.0.{name}"])
    grown.mtp[1].e_proj.weight.data.zero_()
    assert grown.mtp[2].e_proj.weight.any(), "copies must not share storage"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_head_that_does_not_fit_is_refused(damage: str) -> None:
    model = random_backbone()
    tensors = dict(random_stack(model).state_dict())
    if damage == "missing":
        del tensors["mtp.0.enorm.weight"]
    elif damage == "unexpected":
        tensors["mtp.0.markov_head.weight"] = torch.zeros(1)
    else:
        tensors["mtp.0.e_proj.weight"] = tensors["mtp.0.e_proj.weight"][:-1]
    with pytest.raises(UserError, match=r"enorm|markov_head|e_proj"):
        stack_from_tensors(model.config, 1, tensors, "test")


def test_heads_survive_a_round_trip_through_a_file(tmp_path) -> None:  # noqa: ANN001
    model = random_backbone()
    stack = random_stack(model, depth=2)
    before = copy.deepcopy(stack.state_dict())
    save_file(stack.state_dict(), tmp_path / "mtp.safetensors")
    loaded = stack_from_tensors(model.config, 2, load_file(tmp_path / "mtp.safetensors"), "test")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_shared_mode_rejects_a_second_module() -> None:
    with pytest.raises(UserError, match=r"mtp\.depth=2.*mtp\.mode=stacked"):
        MtpConfig(depth=2)
