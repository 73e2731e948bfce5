"""Decoding with a frozen DeepSeek-V4 through `BackboneCache`: a step equals transformers' forward up to rounding.

Weights and pointwise maths are transformers' modules. This module replicates only the parts that the cache changes: the
keys that a query sees, and the step at which a compression window closes. Sources: `modeling_deepseek_v4.py` of
transformers 5.17 and 5.23, and the DeepSeek-V4 paper, sections 2.3.1 (CSA and its indexer) and 2.3.2 (HCA).
"""

# B rows, S new tokens, N residual streams, D hidden size, H heads, C channels of a head, L keys that a query may see,
# F channels of the raw compressor inputs, M windows that may close, W compressed entries, r rotated channel pairs

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4DecoderLayer,
    DeepseekV4Indexer,
    DeepseekV4IndexerScorer,
)

from mtptrain.backbone.cache import BackboneCache, CompressorState, LayerCache
from mtptrain.backbone.modules import norm_and_rotate_
from mtptrain.backbone.pooling import Compressor, pool_windows
from mtptrain.backbone.step_plan import StepPlan, WindowPlan, plan_step
from mtptrain.kernels.dispatch import use_triton
from mtptrain.kernels.hyper_connection import expand_and_mix
from mtptrain.kernels.norm_rotate import rotate_
from mtptrain.kernels.sink_attention import Cached, cached_attention, unfit


@torch.no_grad()
def decode_step(model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Run S new tokens of every row at positions length..length+S-1 and add them to the cache.

    Args:
        model: the frozen backbone.
        cache: state of the rows, in the model's dtype and on its device.
        tokens_BS: int64 token ids. S may exceed `cache.max_step` in a prefill.

    Returns:
        streams_BSND: output of the last decoder layer, before `hc_head` and the final norm.
        hidden_BSD: `norm(hc_head(streams))`, the input of `lm_head`.

    Raises:
        ValueError: a row has no room for S tokens, or the batch size is not the cache's.
    """
    batch, num_tokens = tokens_BS.shape
    if batch != cache.length_B.shape[0] or num_tokens < 1:
        raise ValueError(f"tokens must be [{cache.length_B.shape[0]}, S >= 1], got {tuple(tokens_BS.shape)}")
    cache.require_room(num_tokens)
    return run_step(model, cache, tokens_BS)


@torch.no_grad()
def run_step(model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Run `decode_step` without its checks: it never waits for the device, so a CUDA graph can record it."""
    num_tokens, backbone = tokens_BS.shape[1], model.model
    embedded_BSD = backbone.embed_tokens(tokens_BS)
    keys_BRC = cache.layers[0].ring.values_BRC  # same width as the heads, same dtype as the queries
    has_masks = not use_triton("sink_attention", keys_BRC, unfit(keys_BRC))
    plan = plan_step(cache, num_tokens, embedded_BSD.dtype, has_masks)
    streams_BSND = embedded_BSD.unsqueeze(2).expand(-1, -1, model.config.hc_mult, -1).contiguous()
    for layer, layer_cache in zip(backbone.layers, cache.layers, strict=True):
        if streams_BSND.device != layer_cache.device:  # the layers are spread over several devices
            streams_BSND, plan = streams_BSND.to(layer_cache.device), plan.to(layer_cache.device)
            tokens_BS = tokens_BS.to(layer_cache.device)
        streams_BSND = _decode_layer(layer, layer_cache, plan, streams_BSND, tokens_BS)
    streams_BSND = streams_BSND.to(embedded_BSD.device)
    cache.advance(num_tokens)
    return streams_BSND, backbone.norm(backbone.hc_head(streams_BSND))


class PrefilledPart(NamedTuple):
    """The result of `decode_step` for positions first..first + S - 1 of the rows `rows`."""

    rows: slice
    first: int
    streams_BSND: Tensor
    hidden_BSD: Tensor


def prefill(
    model: DeepseekV4ForCausalLM, cache: BackboneCache, tokens_BP: Tensor, lengths: list[int], chunk: int = 256
) -> Iterator[PrefilledPart]:
    """Fill an empty cache with prompts of different lengths, part by part and without padding, so the result is exact.

    All rows run together up to the length of the shortest prompt, then each continues alone.

    Args:
        model: the frozen backbone.
        cache: empty.
        tokens_BP: int64 prompts; tokens past a row's length are not read.
        lengths: tokens of each prompt, at least 1.
        chunk: most tokens of a row in one step.
    """
    shortest = min(lengths)
    spans = [(slice(0, len(lengths)), 0, shortest)]
    spans += [(slice(row, row + 1), shortest, length) for row, length in enumerate(lengths)]
    for rows, start, end in spans:
        part = cache.rows(rows)
        for first in range(start, end, chunk):
            tokens_BS = tokens_BP[rows, first : min(first + chunk, end)]
            yield PrefilledPart(rows, first, *decode_step(model, part, tokens_BS))


def break_zero_ties(scores_BSW: Tensor) -> Tensor:
    """Return indexer scores in which the lower of two entries that scored exactly 0 wins; others are unchanged.

    A query whose heads all clip an entry scores it exactly 0, so ties are common with few heads. On a CPU, the tied
    entries that `torch.topk` keeps depend on the number of entries, including future ones: transformers' forward then
    changes with the tokens that follow. Applying the rule twice changes nothing.

    Args:
        scores_BSW: float32 scores; nonzero ones are assumed to exceed 1e-20 in magnitude.
    """
    order_W = torch.arange(scores_BSW.shape[-1], device=scores_BSW.device, dtype=scores_BSW.dtype) * -1e-30
    return torch.where(scores_BSW == 0, order_W, scores_BSW)


def make_indexers_causal(model: DeepseekV4ForCausalLM) -> None:
    """Apply `break_zero_ties` in transformers' forward too, which makes it causal and equal to decoding."""
    for module in model.modules():
        if isinstance(module, DeepseekV4IndexerScorer):
            module.register_forward_hook(break_zero_ties_hook)


def break_zero_ties_hook(_module: nn.Module, _inputs: tuple[Tensor, ...], scores_BSW: Tensor) -> Tensor:
    """Return `break_zero_ties`, as a forward hook of an indexer's scorer."""
    return break_zero_ties(scores_BSW)


def _decode_layer(
    layer: DeepseekV4DecoderLayer, cache: LayerCache, plan: StepPlan, streams_BSND: Tensor, tokens_BS: Tensor
) -> Tensor:
    post_BSN, comb_BSNN, collapsed_BSD = layer.attn_hc(streams_BSND)
    output_BSD = _attend(layer.self_attn, cache, plan, layer.input_layernorm(collapsed_BSD))
    streams_BSND = expand_and_mix(post_BSN, comb_BSNN, output_BSD, streams_BSND)
    post_BSN, comb_BSNN, collapsed_BSD = layer.ffn_hc(streams_BSND)
    output_BSD = layer.mlp(layer.post_attention_layernorm(collapsed_BSD), input_ids=tokens_BS)
    return expand_and_mix(post_BSN, comb_BSNN, output_BSD, streams_BSND)


def _attend(attention: DeepseekV4Attention, cache: LayerCache, plan: StepPlan, inputs_BSD: Tensor) -> Tensor:
    """Attend over the ring, the new keys and the compressed entries, and write all three to the cache."""
    batch, num_tokens, _ = inputs_BSD.shape
    kind = "main" if cache.compressor is None else "compress"
    rope_BSr = plan.rope_BSr[kind]

    query_latent_BSQ = attention.q_a_norm(attention.q_a_proj(inputs_BSD))
    query_BSHC = attention.q_b_proj(query_latent_BSQ).view(batch, num_tokens, -1, attention.head_dim)
    query_BSHC = norm_and_rotate_(attention.q_b_norm, query_BSHC, rope_BSr.unsqueeze(2))
    key_BSC = norm_and_rotate_(attention.kv_norm, attention.kv_proj(inputs_BSD), rope_BSr)

    local_BXC = torch.cat([cache.ring.values_BRC, key_BSC], dim=1)
    entries_BWC, chosen_BSk, rate, span = None, None, 1, 1
    if attention.compressor is not None and cache.compressor is not None:
        rate, span = cache.compressor.rate, cache.compressor.span
        _compress(attention.compressor, cache.compressor, plan.windows[rate, span], inputs_BSD)
        entries_BWC = cache.compressor.entries_BWC[:, :-1]
        if cache.indexer is not None:
            indexer = cast(DeepseekV4Indexer, attention.compressor.indexer)
            chosen_BSk = _index(indexer, cache.indexer, plan, inputs_BSD, query_latent_BSQ)
    if plan.local_BSL is None:  # the Triton kernel derives visibility from positions
        cached = Cached(local_BXC, entries_BWC, chosen_BSk, plan.length_B)
        settings = {"window": attention.sliding_window, "rate": rate, "scale": attention.scaling}
        output_BHSC = cached_attention(query_BSHC.transpose(1, 2), cached, attention.sinks, rope_BSr, **settings)
        output_BSHC = output_BHSC.transpose(1, 2)
    elif entries_BWC is None:
        output_BSHC = _masked_attention(query_BSHC, local_BXC, plan.local_BSL, plan.unrope_BSr[kind], attention)
    else:
        mask_BSL = torch.cat([plan.local_BSL, _chosen_mask(plan.visible_BSW[rate, span], chosen_BSk)], dim=2)
        key_BLC = torch.cat([local_BXC, entries_BWC], dim=1)
        output_BSHC = _masked_attention(query_BSHC, key_BLC, mask_BSL, plan.unrope_BSr[kind], attention)
    cache.ring.write(plan.ring_slots, key_BSC)

    grouped_BSGC = output_BSHC.view(batch, num_tokens, attention.config.o_groups, -1)
    return attention.o_b_proj(attention.o_a_proj(grouped_BSGC).flatten(2))


def _chosen_mask(visible_BSW: Tensor, chosen_BSk: Tensor | None) -> Tensor:
    """Return 0 for entries that a query may see and its indexer, if any, chose; -inf elsewhere."""
    if chosen_BSk is None:
        return visible_BSW
    # A query that sees fewer entries than it may choose also chose invisible ones: their -inf is added back.
    return torch.full_like(visible_BSW, float("-inf")).scatter_(-1, chosen_BSk, 0.0) + visible_BSW


def _masked_attention(
    query_BSHC: Tensor, key_BLC: Tensor, mask_BSL: Tensor, unrope_BSr: Tensor, attention: DeepseekV4Attention
) -> Tensor:
    """Return `eager_attention_forward` with K = V and one KV head, [B, S, H, C], rotated back."""
    batch, num_tokens, num_heads, channels = query_BSHC.shape
    score_BXL = query_BSHC.view(batch, -1, channels) @ key_BLC.transpose(1, 2)  # X = S * H, queries of all heads
    score_BSHL = score_BXL.view(batch, num_tokens, num_heads, -1)
    score_BSHL = torch.add(mask_BSL.unsqueeze(2), score_BSHL, alpha=attention.scaling)
    sink_BSH1 = attention.sinks.view(1, 1, -1, 1).expand(batch, num_tokens, -1, -1)
    # The sinks are float32 even in a bfloat16 model, so this softmax is in float32, like upstream's.
    weight_BSHL = torch.cat([score_BSHL, sink_BSH1], dim=-1).softmax(dim=-1)[..., :-1].to(key_BLC.dtype)
    output_BSHC = (weight_BSHL.flatten(1, 2) @ key_BLC).view(query_BSHC.shape)
    return rotate_(output_BSHC, unrope_BSr.unsqueeze(2))


def _compress(module: Compressor, state: CompressorState, windows: WindowPlan, inputs_BSD: Tensor) -> None:
    """Write the entries of the windows that the new tokens close, then the new tokens' raw inputs."""
    raw_BSF = torch.cat([module.kv_proj(inputs_BSD), module.gate_proj(inputs_BSD)], dim=-1)
    all_BXF = torch.cat([state.raw.values_BRC, raw_BSF], dim=1)  # X = Q + S tokens
    picked = all_BXF.flatten(0, 1).index_select(0, windows.source)
    picked_BMTF = picked.view(inputs_BSD.shape[0], -1, state.rate, picked.shape[-1])
    kv_BMTF, gate_BMTF = picked_BMTF.chunk(2, dim=-1)
    entry_BMC = pool_windows(module, kv_BMTF, gate_BMTF, windows.first_BM11, windows.rope_BMr)
    channels = entry_BMC.shape[-1]
    state.entries_BWC.view(-1, channels).index_copy_(0, windows.target, entry_BMC.view(-1, channels))
    state.raw.write(windows.raw_slots, raw_BSF)


def _index(
    indexer: DeepseekV4Indexer, state: CompressorState, plan: StepPlan, inputs_BSD: Tensor, query_latent_BSQ: Tensor
) -> Tensor:
    """Return each query's `index_topk` best entries, int64 [B, S, k]; invisible ones if it sees fewer than k."""
    _compress(indexer, state, plan.windows[state.rate, state.span], inputs_BSD)
    batch, num_tokens, _ = inputs_BSD.shape
    query_BSHC = indexer.q_b_proj(query_latent_BSQ).view(batch, num_tokens, -1, indexer.head_dim)
    query_BSHC = rotate_(query_BSHC, plan.rope_BSr["compress"].unsqueeze(2))
    score_BSW = indexer.scorer(query_BSHC, state.entries_BWC[:, :-1], inputs_BSD)
    score_BSW = break_zero_ties(score_BSW) + plan.visible_BSW[state.rate, state.span]
    return score_BSW.topk(indexer.index_topk, dim=-1, sorted=False).indices
