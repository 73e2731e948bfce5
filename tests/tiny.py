"""A random DeepSeek-V4 small enough for a unit test, with weights large enough that every branch matters."""

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mtptrain.backbone.decode import make_indexers_causal
from mtptrain.backbone.modules import replace_experts, replace_norms
from mtptrain.batch import Batch
from mtptrain.mtp.stack import MtpStack

LAYER_TYPES = [
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "sliding_attention",
]
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": LAYER_TYPES,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "num_attention_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 8,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 3,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 4096,
}


def random_backbone(seed: int = 0, **overrides: Any) -> DeepseekV4ForCausalLM:
    """A frozen fp32 `DeepseekV4ForCausalLM` in eval mode whose weights depend on `seed` only.

    Args:
        seed: seed of the weights; the global random state is left as it was.
        overrides: fields of `DeepseekV4Config` that replace those of `TINY`.
    """
    config = DeepseekV4Config(**{**TINY, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(config)
        for name, parameter in model.named_parameters():
            _randomise(name, parameter)
        for layer in model.model.layers:
            _fill_routing(layer.mlp.gate, config)
    make_indexers_causal(model)  # with two index heads, entries that score exactly 0 are common
    replace_norms(model)
    replace_experts(model)
    return model.eval().requires_grad_(False)


def three_layers(**overrides: Any) -> DeepseekV4ForCausalLM:
    """A `random_backbone` with each kind of layer once and two Sinkhorn iterations: passes take a quarter less."""
    kinds = {"layer_types": LAYER_TYPES[:3], "mlp_layer_types": TINY["mlp_layer_types"][:3], "num_hidden_layers": 3}
    return random_backbone(**{**kinds, "hc_sinkhorn_iters": 2, **overrides})


@torch.no_grad()
def _randomise(name: str, parameter: nn.Parameter) -> None:
    if "norm" in name:
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("scale"):
        parameter.fill_(0.5)
    elif name.endswith(("sinks", "position_bias", "base")):
        parameter.normal_(std=0.5)
    else:
        parameter.normal_(std=0.2)


@torch.no_grad()
def _fill_routing(gate: nn.Module, config: DeepseekV4Config) -> None:
    """Give hash routing k distinct experts a token, and the learned router a bias that changes its choice."""
    if hasattr(gate, "tid2eid"):
        scores_VE = torch.rand(config.vocab_size, config.n_routed_experts)
        gate.tid2eid.copy_(scores_VE.topk(config.num_experts_per_tok).indices)
    else:
        gate.e_score_correction_bias.normal_(std=0.1)


def random_stack(model: DeepseekV4ForCausalLM, depth: int = 1, seed: int = 1) -> MtpStack:
    """MTP modules for `model` with weights as large as the backbone's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stack = MtpStack(model.config, depth)
        for name, parameter in stack.named_parameters():
            _randomise(name, parameter)
        for block in stack.mtp:
            _fill_routing(block.layer.mlp.gate, model.config)
    return stack


def random_batch(vocab_size: int, rows: list[list[int]], row_length: int, seed: int = 2) -> Batch:
    """Packed rows of random tokens; `rows` lists the sizes of the pieces of each row."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(vocab_size, (len(rows), row_length), generator=generator)
    segment_BS, position_BS = torch.zeros_like(tokens_BS), torch.zeros_like(tokens_BS)
    for row, sizes in enumerate(rows):
        start = 0
        for number, size in enumerate(sizes, start=1):
            segment_BS[row, start : start + size] = number
            position_BS[row, start : start + size] = torch.arange(size)
            start += size
    return Batch(tokens_BS.masked_fill(segment_BS == 0, 0), segment_BS, position_BS)
