"""`attn_implementation="mtptrain"`: transformers' forward of a whole sequence, in memory linear in its length.

transformers' eager attention holds the scores of every query against every key, a mask of the same size, and in CSA the
indexer's scores of all its heads. Here attention receives the keys and, in CSA, the entries chosen for each query; all
other visibility follows from the query's position. The compressors pass the chosen entries on in place of their mask.
"""

# B rows, S tokens, H heads, C channels of a head, X keys, W compressed entries, T entries chosen for a query,
# r channel pairs that are rotated

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4CSACompressor,
    DeepseekV4HCACompressor,
    DeepseekV4Indexer,
)

from mtptrain.backbone.pooling import pool_windows
from mtptrain.kernels.norm_rotate import rotate_, runs_triton
from mtptrain.kernels.sink_attention import Cached, cached_attention

NAME = "mtptrain"
NO_CACHE = (
    f"attn_implementation={NAME} runs whole sequences (use_cache=False); mtptrain.backbone.decode decodes with a cache"
)
BLOCK_QUERIES = 64  # queries that the indexer scores at a time, as [B, 64, heads, W]; sink_attention uses the same


def attention_forward(
    module: DeepseekV4Attention,
    query_BHSC: Tensor,
    key_B1XC: Tensor,
    _value_B1XC: Tensor,
    chosen: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the output [B, S, H, C] of one layer; transformers passes a CSA indexer's chosen entries as the mask.

    Raises:
        ValueError: the layer's compressor is not one of this module's.
    """
    num_tokens, compressor = query_BHSC.shape[2], module.compressor
    if not isinstance(compressor, (HcaCompressor, CsaCompressor, type(None))):
        raise ValueError(f"attn_implementation={NAME} needs `use_linear_attention(model)` once the model is built")
    entries_BWC = None if compressor is None else key_B1XC[:, 0, num_tokens:]
    chosen_BST = chosen if isinstance(compressor, CsaCompressor) else None
    return attend(module, query_BHSC, key_B1XC[:, 0, :num_tokens], entries_BWC, chosen_BST), None


def attend(
    module: DeepseekV4Attention,
    query_BHSC: Tensor,
    key_BSC: Tensor,
    entries_BWC: Tensor | None,
    chosen_BST: Tensor | None,
    turn_BSr: Tensor | None = None,
) -> Tensor:
    """Return the output [B, S, H, C] of one layer for whole sequences, rotated back if `turn_BSr` is given."""
    length_B = torch.zeros(len(query_BHSC), dtype=torch.int64, device=query_BHSC.device)
    out_BHSC = cached_attention(
        query_BHSC,
        Cached(key_BSC, entries_BWC, chosen_BST, length_B),
        module.sinks,
        turn_BSr,
        window=module.sliding_window,
        rate=1 if module.compressor is None else module.compressor.compress_rate,
        scale=module.scaling,
    )
    return out_BHSC.transpose(1, 2)


def no_mask(
    *_: Any, q_length: int, kv_length: int, attention_mask: Tensor | None = None, device: Any = None, **__: Any
) -> Tensor:
    """Return an empty mask, to which transformers then appends only the compressor's output.

    Raises:
        ValueError: the call masks padding, or has cached keys of an earlier call.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(f"attn_implementation={NAME} knows no padding mask: pad at the end, without a mask")
    if kv_length != q_length:
        raise ValueError(NO_CACHE)
    return torch.empty(0, dtype=torch.int64, device=device)


class Attention(DeepseekV4Attention):
    """transformers' module; where Triton runs, each norm takes the rotation after it into its launch."""

    def forward(  # type: ignore[override, unused-ignore]
        self,
        hidden_states: Tensor,
        position_embeddings: dict[str, tuple[Tensor, Tensor]],
        position_ids: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, S, D], and None in place of the weights."""
        has_cache = any(others.get(name) is not None for name in ("cache", "past_key_values"))
        if has_cache or torch.is_grad_enabled() or not runs_triton(hidden_states):
            out: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, position_ids, attention_mask, **others
            )
            return out
        cos_BSr, sin_BSr = position_embeddings[self.rope_layer_type]
        turn_BSr = torch.complex(cos_BSr.float(), sin_BSr.float())
        latent_BSQ = self.q_a_norm(self.q_a_proj(hidden_states))
        query_BSHC = self.q_b_proj(latent_BSQ).unflatten(-1, (self.num_heads, self.head_dim))
        query_BSHC = self.q_b_norm(query_BSHC, turn_BSr.unsqueeze(2))
        key_BSC = self.kv_norm(self.kv_proj(hidden_states), turn_BSr)
        entries_BWC, chosen_BST = None, None
        if self.compressor is not None:
            entries_B1WC, chosen_BST = self.compressor(hidden_states, latent_BSQ, position_ids, None, self.layer_idx)
            entries_BWC = entries_B1WC.squeeze(1)
        out_BSHC = attend(self, query_BSHC.transpose(1, 2), key_BSC, entries_BWC, chosen_BST, turn_BSr)
        grouped = out_BSHC.reshape(*key_BSC.shape[:2], self.config.o_groups, -1)
        return self.o_b_proj(self.o_a_proj(grouped).flatten(2)), None


class HcaCompressor(DeepseekV4HCACompressor):
    """transformers' module without its mask."""

    def forward(  # type: ignore[override, unused-ignore]
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, past_key_values: Any, layer_idx: int
    ) -> tuple[Tensor, None]:
        """Return the entries [B, 1, W, C]."""
        if past_key_values is not None:
            raise ValueError(NO_CACHE)
        # For a single position transformers makes no mask.
        return super().forward(hidden_states, q_residual, position_ids[:, :1], None, layer_idx)[0], None


class CsaCompressor(DeepseekV4CSACompressor):
    """transformers' module with the indexer's chosen entries in place of a mask."""

    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, past_key_values: Any, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Return the entries [B, 1, W, C] and those chosen, int64 [B, S, T]; -1 if a query sees fewer than T."""
        if past_key_values is not None:
            raise ValueError(NO_CACHE)
        entries_BWC = whole_windows(self, hidden_states)
        return entries_BWC.unsqueeze(1), self.indexer(hidden_states, q_residual, position_ids, None, layer_idx)


class Indexer(DeepseekV4Indexer):
    """transformers' module, computed for one block of queries at a time."""

    def forward(  # type: ignore[override, unused-ignore]
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, past_key_values: Any, layer_idx: int
    ) -> Tensor:
        """Return the `index_topk` best visible entries of each query, int64 [B, S, T]; -1 if it sees fewer than T."""
        entries_BWC = whole_windows(self, hidden_states)
        num_tokens, num_entries = hidden_states.shape[1], entries_BWC.shape[1]
        if num_entries == 0:
            return position_ids.new_empty(*hidden_states.shape[:2], 0)
        rope_BSr = rotation(self, hidden_states, position_ids)
        entry_W = torch.arange(num_entries, device=hidden_states.device)
        blocks = []
        for begin in range(0, num_tokens, BLOCK_QUERIES):
            rows = slice(begin, begin + BLOCK_QUERIES)
            query_BQHC = self.q_b_proj(q_residual[:, rows]).unflatten(-1, (self.num_heads, self.head_dim))
            query_BQHC = rotate_(query_BQHC, rope_BSr[:, rows].unsqueeze(2))
            score_BQW = self.scorer(query_BQHC, entries_BWC, hidden_states[:, rows])
            seen_BQ1 = ((position_ids[:, rows] + 1) // self.compress_rate).unsqueeze(-1)
            score_BQW = score_BQW.masked_fill(entry_W >= seen_BQ1, float("-inf"))
            chosen_BQT = score_BQW.topk(min(self.index_topk, num_entries), dim=-1).indices
            blocks.append(chosen_BQT.masked_fill(chosen_BQT >= seen_BQ1, -1))
        return torch.cat(blocks, dim=1)


def whole_windows(module: CsaCompressor | Indexer, hidden_BSD: Tensor) -> Tensor:
    """Return the entries [B, W, C] of all windows that a sequence starting at position 0 closes."""
    rate = module.compress_rate
    num_windows = hidden_BSD.shape[1] // rate
    inputs_BSD = hidden_BSD[:, : num_windows * rate]
    # An empty window before the first one.
    kv_BMTF, gate_BMTF = (
        nn.functional.pad(x.unflatten(1, (num_windows, rate)), (0, 0, 0, 0, 1, 0))
        for x in (module.kv_proj(inputs_BSD), module.gate_proj(inputs_BSD))
    )
    window_1M = torch.arange(num_windows, device=hidden_BSD.device).unsqueeze(0)
    rope_1Mr = rotation(module, hidden_BSD, window_1M * rate)
    return pool_windows(module, kv_BMTF, gate_BMTF, (window_1M == 0)[:, :, None, None], rope_1Mr)


def rotation(module: CsaCompressor | Indexer, like: Tensor, position_BS: Tensor) -> Tensor:
    """Return the RoPE rotations of positions, complex64 [B, S, r], with transformers' rounding."""
    cos_BSr, sin_BSr = module.rotary_emb(like, position_ids=position_BS, layer_type=module.rope_layer_type)
    return torch.complex(cos_BSr.float(), sin_BSr.float())


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    DeepseekV4Attention: Attention,
    DeepseekV4HCACompressor: HcaCompressor,
    DeepseekV4CSACompressor: CsaCompressor,
    DeepseekV4Indexer: Indexer,
}


def use_linear_attention(model: DeepseekV4ForCausalLM) -> None:
    """Switch a DeepSeek-V4 of transformers to `attn_implementation="mtptrain"`; tensors and their names stay."""
    for child in model.modules():
        if type(child) in REPLACED:
            child.__class__ = REPLACED[type(child)]
    model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, no_mask)
