"""DeepSeek-V4's attention: shared keys and values, a sink for each head, a sliding window and further keys.

Values are rotated keys, so every function rotates its output back by the positions of the queries.
"""

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..norm_rotate import rotate_
from .blocked import cached_attention_blocked, rollout_attention_blocked
from .reference import Cached, document_starts, masked_attention_reference

__all__ = ["Cached", "cached_attention", "document_starts", "masked_attention", "rollout_attention", "unfit"]


def rollout_attention(
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
    """Return `rollout_attention_reference`, in memory linear in S.

    Args, Returns: see `rollout_attention_reference`.

    Raises:
        ValueError: shapes disagree, or the window does not hold the chain.
    """
    batch, _, num_slots, channels = query_BHSC.shape
    num_chain = 0 if chain_BSLC is None else chain_BSLC.shape[2]
    if context_BSC.shape != (batch, num_slots, channels):
        raise ValueError(
            f"context_BSC is {tuple(context_BSC.shape)} but must be ({batch}, {num_slots}, {channels}):"
            " one key per slot"
        )
    if chain_BSLC is not None and chain_BSLC.shape != (batch, num_slots, num_chain, channels):
        raise ValueError(
            f"chain_BSLC is {tuple(chain_BSLC.shape)} but must be ({batch}, {num_slots}, L, {channels}):"
            " L keys per slot"
        )
    if start_BS.shape != (batch, num_slots):
        raise ValueError(f"start_BS is {tuple(start_BS.shape)} but must be ({batch}, {num_slots}): see document_starts")
    if window < max(num_chain, 1):
        raise ValueError(f"window={window} must hold the chain's {num_chain} keys, and at least one")
    _check_turn(query_BHSC, turn_BSr)
    arguments = (query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, turn_BSr)
    if use_triton("sink_attention", query_BHSC, unfit(query_BHSC)):
        from .kernel import rollout_attention_triton  # needs Triton, which a machine without a GPU may lack

        return rollout_attention_triton(*arguments, window=window, scale=scale)
    return rollout_attention_blocked(*arguments, window=window, scale=scale)


def cached_attention(
    query_BHSC: Tensor,
    cached: Cached,
    sinks_H: Tensor,
    turn_BSr: Tensor | None = None,
    *,
    window: int,
    rate: int,
    scale: float,
) -> Tensor:
    """Return `cached_attention_reference`; Triton gives it no gradient.

    Raises:
        ValueError: shapes disagree.
    """
    batch, _, num_slots, channels = query_BHSC.shape
    local_BXC, entries_BWC, chosen_BST, length_B = cached
    if local_BXC.shape[0] != batch or local_BXC.shape[1] < num_slots or local_BXC.shape[2] != channels:
        raise ValueError(
            f"local_BXC is {tuple(local_BXC.shape)} but must be ({batch}, at least {num_slots}, {channels})"
        )
    if entries_BWC is not None and (entries_BWC.shape[0], entries_BWC.shape[2]) != (batch, channels):
        raise ValueError(f"entries_BWC is {tuple(entries_BWC.shape)} but must be ({batch}, W, {channels})")
    if chosen_BST is not None and (entries_BWC is None or chosen_BST.shape[:2] != (batch, num_slots)):
        raise ValueError(f"chosen_BST is {tuple(chosen_BST.shape)} but must be ({batch}, {num_slots}, T), of entries")
    if length_B.shape != (batch,):
        raise ValueError(f"length_B is {tuple(length_B.shape)} but must be ({batch},)")
    if turn_BSr is not None:
        _check_turn(query_BHSC, turn_BSr)
    if use_triton("sink_attention", query_BHSC, unfit(query_BHSC)):
        from .kernel import cached_attention_triton  # needs Triton, which a machine without a GPU may lack

        return cached_attention_triton(query_BHSC, cached, sinks_H, turn_BSr, window=window, rate=rate, scale=scale)
    return cached_attention_blocked(query_BHSC, cached, sinks_H, turn_BSr, window=window, rate=rate, scale=scale)


def masked_attention(
    query_BHSC: Tensor,
    key_BXC: Tensor,
    chain_BSLC: Tensor | None,
    sinks_H: Tensor,
    mask_BSX: Tensor,
    turn_BSr: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return `masked_attention_reference`, rotated back in place."""
    out_BHSC = masked_attention_reference(query_BHSC, key_BXC, chain_BSLC, sinks_H, mask_BSX, scale)
    return rotate_(out_BHSC.transpose(1, 2), turn_BSr.conj().unsqueeze(2)).transpose(1, 2)


def _check_turn(query_BHSC: Tensor, turn_BSr: Tensor) -> None:
    batch, _, num_slots, channels = query_BHSC.shape
    rows, slots, pairs = turn_BSr.shape
    if rows not in (1, batch) or slots != num_slots or not 0 < 2 * pairs <= channels:
        raise ValueError(
            f"turn_BSr is {tuple(turn_BSr.shape)} but must be ({batch} or 1, {num_slots}, up to {channels // 2})"
        )


def unfit(query: Tensor) -> str | None:
    """Return why the Triton kernels cannot take these queries, or None."""
    if query.dtype is torch.float64:
        return "its queries are float64"
    channels = query.shape[-1]
    fits = channels <= 512 and channels % 2 == 0
    return None if fits else f"its heads are {channels} channels wide; it takes an even number up to 512"
