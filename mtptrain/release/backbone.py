"""The tensors of a released backbone: their names in `DeepseekV4ForCausalLM` and their storage in a release.

transformers reads releases; this module writes them, for miniatures in the official format.

Source: the index of deepseek-ai/DeepSeek-V4-Flash and the headers of its shards; transformers 5.23,
`conversion_mapping.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import DeepseekV4Config

from mtptrain.release.modules import part_of, store_row
from mtptrain.release.names import ENTRIES, EXPERT_ENTRIES, Row, Scheme, Stored, stored_rows
from mtptrain.release.problems import Problems

# Released name, transformers' name, storage.
OUTSIDE_LAYERS: tuple[tuple[str, str, Stored], ...] = (
    ("embed.weight", "model.embed_tokens.weight", "bf16"),
    ("head.weight", "lm_head.weight", "bf16"),
    ("norm.weight", "model.norm.weight", "bf16"),
    ("hc_head_fn", "model.hc_head.hc_fn", "f32"),
    ("hc_head_base", "model.hc_head.hc_base", "f32"),
    ("hc_head_scale", "model.hc_head.hc_scale", "f32"),
)
# Tensors of a layer that an MTP module does not have.
COMPRESSOR: tuple[tuple[str, str, Stored], ...] = (
    ("attn.compressor.ape", "self_attn.compressor.position_bias", "f32"),
    ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight", "bf16"),
    ("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight", "bf16"),
    ("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", "bf16"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias", "f32"),
    ("attn.indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight", "bf16"),
    ("attn.indexer.compressor.wgate.weight", "self_attn.compressor.indexer.gate_proj.weight", "bf16"),
    ("attn.indexer.compressor.wkv.weight", "self_attn.compressor.indexer.kv_proj.weight", "bf16"),
    ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight", "fp8"),
    ("attn.indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight", "bf16"),
    ("ffn.gate.tid2eid", "mlp.gate.tid2eid", "i64"),
)
BLOCK_LAYER = "layer."  # the decoder layer of an `MtpBlock`


def _layer_names() -> list[tuple[str, str, Stored]]:
    """Return all names that a layer may have, below `layers.{i}.` and `model.layers.{i}.`, except routed experts."""
    shared = [
        (e.released, e.ours.removeprefix(BLOCK_LAYER), e.stored) for e in ENTRIES if e.ours.startswith(BLOCK_LAYER)
    ]
    return [*shared, *COMPRESSOR]


def iterate_backbone(
    state: Mapping[str, Tensor], config: DeepseekV4Config, scheme: Scheme
) -> Iterator[tuple[str, Tensor]]:
    """Yield the released names and tensors of a backbone, one by one; each of its tensors is used exactly once.

    Args:
        state: `DeepseekV4ForCausalLM.state_dict()`.
        config: config of the model.
        scheme: storage of matrices and experts.

    Raises:
        UserError: a tensor is not in the table, or the scheme cannot store a value.
    """
    used: set[str] = set()
    for released, ours, stored in OUTSIDE_LAYERS:
        used.add(ours)
        yield from _store(released, ours, stored, state[ours], scheme)
    for number in range(config.num_hidden_layers):
        prefix, our_prefix = f"layers.{number}.", f"model.layers.{number}."
        for released, ours, stored in _layer_names():
            if our_prefix + ours in state:  # the layer's kind decides on its compressor
                used.add(our_prefix + ours)
                yield from _store(prefix + released, our_prefix + ours, stored, state[our_prefix + ours], scheme)
        for row in _expert_rows(config, scheme):
            used.add(our_prefix + row.ours)
            yield from store_row(row, prefix, part_of(row, state[our_prefix + row.ours]), None)
    Problems(unexpected=sorted(state.keys() - used)).raise_any("the backbone's tensors")


def _store(released: str, ours: str, stored: Stored, weight: Tensor, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    row = next(stored_rows(released, ours, tuple(weight.shape), stored, scheme))
    yield from store_row(row, "", weight, None)


def _expert_rows(config: DeepseekV4Config, scheme: Scheme) -> Iterator[Row]:
    """Yield the rows of the routed experts of one layer, without rows of scales."""
    inner, width = config.moe_intermediate_size, config.hidden_size
    shapes = {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
    for expert in range(config.n_routed_experts):
        for entry in EXPERT_ENTRIES:
            released = entry.released.replace(".E.", f".{expert}.")
            shape = shapes[released.split(".")[-2]]
            yield next(stored_rows(released, entry.ours.removeprefix(BLOCK_LAYER), shape, "expert", scheme, expert))
