"""Build a DeepSeek-V4 backbone from scratch, of transformers' classes."""

from __future__ import annotations

from importlib.resources import files

import torch
import yaml
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.config import ShapeConfig

LAYER_TYPES = {
    "sliding": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def model_config(shape: ShapeConfig) -> DeepseekV4Config:
    """Return the transformers config for a shape."""
    num_layers = len(shape.layer_types)
    return DeepseekV4Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.expert_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=1,
        head_dim=shape.head_dim,
        partial_rotary_factor=shape.rope_head_dim / shape.head_dim,
        q_lora_rank=shape.q_lora_rank,
        o_groups=shape.o_groups,
        o_lora_rank=shape.o_lora_rank,
        num_experts_per_tok=shape.experts_per_token,
        n_routed_experts=shape.num_experts,
        max_position_embeddings=shape.max_positions,
        layer_types=[LAYER_TYPES[name] for name in shape.layer_types],
        compress_rates={LAYER_TYPES["csa"]: shape.csa_rate, LAYER_TYPES["hca"]: shape.hca_rate},
        mlp_layer_types=["hash_moe" if i < shape.num_hash_layers else "moe" for i in range(num_layers)],
        sliding_window=shape.sliding_window,
        index_n_heads=shape.index_heads,
        index_head_dim=shape.index_head_dim,
        index_topk=shape.index_topk,
        hc_mult=shape.hc_mult,
        hc_sinkhorn_iters=shape.sinkhorn_iterations,
        num_nextn_predict_layers=1,
    )


def preset_config(name: str) -> DeepseekV4Config:
    """Return the transformers config for the sizes of a preset in conf/backbone."""
    text = files("mtptrain.conf").joinpath("backbone", f"{name}.yaml").read_text(encoding="utf-8")
    return model_config(ShapeConfig(**yaml.safe_load(text).get("shape", {})))


def build_model(shape: ShapeConfig, seed: int, device: torch.device) -> DeepseekV4ForCausalLM:
    """Return a freshly initialised backbone, fp32."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(model_config(shape))
    initialize_routing(model, shape)
    nn.Module.to(model, device)
    return model


def initialize_routing(model: DeepseekV4ForCausalLM, shape: ShapeConfig) -> None:
    """Give every token distinct experts in the layers that choose them by token.

    transformers leaves their table at zero, which would send every token to expert 0.
    """
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            table_VE = torch.rand(shape.vocab_size, shape.num_experts)
            layer.mlp.gate.tid2eid.copy_(table_VE.topk(shape.experts_per_token).indices)
