"""Definition of DeepSeek-V4's attention: of a draft step, as in serving, and of a backbone layer.

Keys and values are shared, there is one KV head, and RoPE is already applied; as values are rotated keys, the output is
rotated back by the query's position. Each head has a learned sink: a logit that takes weight and contributes no value.
"""

# B rows, S queries (anchors), X keys, H heads, C head width, L chain keys of an anchor, W compressed entries, T entries
# chosen for a query, r channel pairs that are rotated

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..norm_rotate.reference import rotate_reference


def masked_attention_reference(
    query_BHSC: Tensor, key_BXC: Tensor, chain_BSLC: Tensor | None, sinks_H: Tensor, mask_BSX: Tensor, scale: float
) -> Tensor:
    """Return attention with sinks over the keys that a mask allows, and over the chain of each query.

    Args:
        query_BHSC: queries, floating.
        key_BXC: keys, which are also the values.
        chain_BSLC: further keys that only one query sees; None for no chain.
        sinks_H: logit of each head's sink.
        mask_BSX: bool, True for each key that a query sees.
        scale: factor on the scores.

    Returns:
        [B, H, S, C] in the queries' dtype, computed in float32 (in float64 from float64 queries).
    """
    dtype = torch.promote_types(query_BHSC.dtype, torch.float32)
    query_BSHC, key = query_BHSC.transpose(1, 2).to(dtype) * scale, key_BXC.to(dtype)
    batch, num_slots, num_heads, _ = query_BSHC.shape
    # One KV head: the queries of all heads are rows of one product.
    scores_BSHX = torch.bmm(query_BSHC.flatten(1, 2), key.transpose(1, 2)).view(batch, num_slots, num_heads, -1)
    parts = [scores_BSHX.masked_fill(~mask_BSX.unsqueeze(2), float("-inf"))]
    if chain_BSLC is not None:
        chain = chain_BSLC.to(dtype)
        parts.append(torch.matmul(query_BSHC, chain.transpose(2, 3)))
    parts.append(sinks_H.to(dtype).view(1, 1, -1, 1).expand(batch, num_slots, -1, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    num_keys = key.shape[1]
    out_BSHC = torch.bmm(weights[..., :num_keys].flatten(1, 2), key).view(query_BSHC.shape)
    if chain_BSLC is not None:
        out_BSHC = out_BSHC + torch.matmul(weights[..., num_keys:-1], chain)
    return out_BSHC.transpose(1, 2).to(query_BHSC.dtype)


def rotate_back(out_BHSC: Tensor, turn_BSr: Tensor) -> Tensor:
    """Return an attention's output, rotated back by the rotations of its queries."""
    return rotate_reference(out_BHSC.transpose(1, 2), turn_BSr.conj().unsqueeze(2)).transpose(1, 2)


def rollout_attention_reference(
    query_BHSC: Tensor,
    context_BSC: Tensor,
    chain_BSLC: Tensor | None,
    sinks_H: Tensor,
    start_BS: Tensor,
    turn_BSr: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Return the attention of one rollout step at every anchor, rotated back.

    L steps past its module's base step, the query at anchor i sees the base-step keys of slots i + L - window < j <= i
    of its document, then the L keys of its chain: `window` keys in all, the sliding window of the decoder layer.

    Args:
        query_BHSC: queries, floating.
        context_BSC: base-step keys (= values).
        chain_BSLC: keys of each anchor's later steps, that of the query last; None at the base step.
        sinks_H: logit of each head's sink.
        start_BS: int64, the first slot of each anchor's document, see `document_starts`.
        turn_BSr: complex64 rotations of the queries, [B, S, r] or [1, S, r]; they get no gradient.
        window: upper bound on the keys that a query sees, at least L.
        scale: factor on the scores.

    Returns:
        [B, H, S, C] in the queries' dtype, computed in float32; rounded before the rotation, too.

    Source: DeepSeek-V4 sliding attention; serving order of keys as in vLLM and SGLang, see docs/rollout.md.
    """
    slot_S = torch.arange(query_BHSC.shape[2], device=query_BHSC.device)
    num_chain = 0 if chain_BSLC is None else chain_BSLC.shape[2]
    first_BS1 = torch.maximum(start_BS, slot_S - (window - num_chain) + 1).unsqueeze(2)
    mask_BSS = (slot_S >= first_BS1) & (slot_S <= slot_S.unsqueeze(1))
    out_BHSC = masked_attention_reference(query_BHSC, context_BSC, chain_BSLC, sinks_H, mask_BSS, scale)
    return rotate_back(out_BHSC, turn_BSr)


class Cached(NamedTuple):
    """The keys of a backbone layer; the queries are at positions length..length + S - 1 of their row."""

    local_BXC: Tensor  # a ring of X - S slots, position p < length in slot p % (X - S), then the S new keys
    entries_BWC: Tensor | None  # entry w summarises the positions below (w + 1) * rate; None in a sliding layer
    chosen_BST: Tensor | None  # int64 entries that a query may see, -1 for none; None if it may see all
    length_B: Tensor  # int64, number of positions before the new ones


def cached_attention_reference(
    query_BHSC: Tensor,
    cached: Cached,
    sinks_H: Tensor,
    turn_BSr: Tensor | None = None,
    *,
    window: int,
    rate: int,
    scale: float,
) -> Tensor:
    """Return the attention of one backbone layer over the sliding window and the complete compressed entries.

    Args:
        query_BHSC: queries, floating.
        cached: the keys.
        sinks_H: logit of each head's sink.
        turn_BSr: as in `rollout_attention_reference`; None if the caller rotates the output back itself.
        window: number of positions that a query sees through the local keys, including itself.
        rate: number of positions that an entry summarises.
        scale: factor on the scores.

    Returns:
        [B, H, S, C] in the queries' dtype, computed in float32.

    Source: DeepSeek-V4 paper, sections 2.3.1 (CSA) and 2.3.2 (HCA); `DeepseekV4Attention` of transformers.
    """
    position_BS = cached.length_B.unsqueeze(1) + torch.arange(query_BHSC.shape[2], device=query_BHSC.device)
    keys, masks = [cached.local_BXC], [local_mask(cached, position_BS, position_BS, window)]
    if cached.entries_BWC is not None:
        keys.append(cached.entries_BWC)
        masks.append(entry_mask(cached.entries_BWC.shape[1], cached.chosen_BST, position_BS, rate))
    out_BHSC = masked_attention_reference(query_BHSC, torch.cat(keys, 1), None, sinks_H, torch.cat(masks, 2), scale)
    return out_BHSC if turn_BSr is None else rotate_back(out_BHSC, turn_BSr)


def local_mask(cached: Cached, position_BQ: Tensor, new_BS: Tensor, window: int) -> Tensor:
    """Return which local keys the queries at some positions see, bool [B, Q, X]; `new_BS`: positions of new keys."""
    ring = cached.local_BXC.shape[1] - new_BS.shape[1]
    last_B1 = cached.length_B.unsqueeze(1) - 1
    slot_R = torch.arange(ring, device=new_BS.device)
    held_BR = last_B1 - (last_B1 - slot_R) % ring if ring else new_BS[:, :0]  # negative in an empty slot
    key_BX = torch.cat([held_BR, new_BS], dim=1).unsqueeze(1)
    age_BQX = position_BQ.unsqueeze(2) - key_BX
    return (age_BQX >= 0) & (age_BQX < window) & (key_BX >= 0)


def entry_mask(num_entries: int, chosen_BQT: Tensor | None, position_BQ: Tensor, rate: int) -> Tensor:
    """Return which compressed entries the queries at some positions see, bool [B, Q, W]."""
    entry_W = torch.arange(num_entries, device=position_BQ.device)
    closed_BQW = entry_W < ((position_BQ + 1) // rate).unsqueeze(2)
    if chosen_BQT is None:
        return closed_BQW
    index_BQT = torch.where(chosen_BQT < 0, num_entries, chosen_BQT)
    picked = torch.zeros(*position_BQ.shape, num_entries + 1, dtype=torch.bool, device=position_BQ.device)
    return closed_BQW & picked.scatter_(2, index_BQT, 1)[..., :-1]


def document_starts(segment_BS: Tensor) -> Tensor:
    """Return the first slot of each slot's run of equal numbers, int64 [B, S].

    [[1, 1, 2, 2, 2, 0]] -> [[0, 0, 2, 2, 2, 5]]
    """
    slot_S = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    begins_BS = torch.ones_like(segment_BS, dtype=torch.bool)
    begins_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    return torch.where(begins_BS, slot_S, 0).cummax(dim=1).values
