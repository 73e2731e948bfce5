"""`sink_attention` in blocks of queries: each block reads only the keys in its reach, so memory is linear in S."""

# B rows, S queries, Q queries of a block, H heads, C head width, L chain keys of an anchor, W compressed entries,
# r channel pairs that are rotated

from __future__ import annotations

import torch
from torch import Tensor

from .reference import Cached, entry_mask, local_mask, masked_attention_reference, rotate_back

# H = 4, C = 32, window 64, fp32, forward and backward on one core of an AMD EPYC, 2026-11, busy machine: 13 ms for
# [4, 256] in blocks of 32 or 64, 18 at 128, 24 dense; 140 for [1, 4096] in blocks of 32 to 128, 5300 dense.
BLOCK_QUERIES = 64


def rollout_attention_blocked(
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
    """Return `rollout_attention_reference`, block by block."""
    num_slots, num_chain = context_BSC.shape[1], 0 if chain_BSLC is None else chain_BSLC.shape[2]
    slot_S = torch.arange(num_slots, device=query_BHSC.device)
    first_BS = torch.maximum(start_BS, slot_S - (window - num_chain) + 1)
    blocks = []
    for begin in range(0, num_slots, BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, num_slots)
        reach = slice(max(begin - window + num_chain + 1, 0), end)
        slot_X, rows = slot_S[reach], slice(begin, end)
        mask_BQX = (slot_X >= first_BS[:, rows, None]) & (slot_X <= slot_S[rows, None])
        chain_BQLC = None if chain_BSLC is None else chain_BSLC[:, rows]
        blocks.append(
            masked_attention_reference(
                query_BHSC[:, :, rows], context_BSC[:, reach], chain_BQLC, sinks_H, mask_BQX, scale
            )
        )
    return rotate_back(torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0], turn_BSr)


def cached_attention_blocked(
    query_BHSC: Tensor,
    cached: Cached,
    sinks_H: Tensor,
    turn_BSr: Tensor | None = None,
    *,
    window: int,
    rate: int,
    scale: float,
) -> Tensor:
    """Return `cached_attention_reference`, block by block; without a ring, a block reads only new keys in its reach."""
    local_BXC, entries_BWC, chosen_BST, length_B = cached
    num_slots = query_BHSC.shape[2]
    position_BS = length_B.unsqueeze(1) + torch.arange(num_slots, device=query_BHSC.device)
    is_whole = local_BXC.shape[1] == num_slots
    blocks = []
    for begin in range(0, num_slots, BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, num_slots)
        rows = slice(begin, end)
        reach = slice(max(begin - window + 1, 0), end) if is_whole else slice(None)
        new_BS = position_BS[:, reach] if is_whole else position_BS
        part = cached._replace(local_BXC=local_BXC[:, reach])
        keys, masks = [part.local_BXC], [local_mask(part, position_BS[:, rows], new_BS, window)]
        if entries_BWC is not None:
            chosen_BQT = None if chosen_BST is None else chosen_BST[:, rows]
            keys.append(entries_BWC)
            masks.append(entry_mask(entries_BWC.shape[1], chosen_BQT, position_BS[:, rows], rate))
        mask_BQX = torch.cat(masks, 2)
        blocks.append(
            masked_attention_reference(query_BHSC[:, :, rows], torch.cat(keys, 1), None, sinks_H, mask_BQX, scale)
        )
    out_BHSC = torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]
    return out_BHSC if turn_BSr is None else rotate_back(out_BHSC, turn_BSr)
