"""`sink_attention` in blocks of queries: each block reads only the keys in its reach, so memory is linear in S.

Rows of zeros follow the keys of a block. Their columns of the scores take those of the chain and of the sink, so one
softmax covers them all without a copy, and their values add nothing. The gradients are those of `kernel.py`; a block's
weights are kept for them.
"""

# B rows, S queries, Q queries of a block, H heads, C head width, L chain keys of an anchor, W compressed entries,
# r channel pairs that are rotated, X keys of a block, E = L + 1 columns of chain and sink, Y = X + E

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..norm_rotate.reference import rotate_in_place_reference, rotate_reference
from .reference import Cached, entry_mask, local_mask, masked_attention_reference, rotate_back

# H = 4, C = 32, window 64, fp32, one core of an AMD EPYC, 2026-11, busy machine, forward and backward: [4, 256] takes
# 13 ms in blocks of 32 or 64, 18 at 128, 24 dense, and 7 with a rollout's analytic gradients; [1, 4096] takes 140 in
# blocks of 32 to 128, 5300 dense.
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
    inputs = [query_BHSC, context_BSC, sinks_H, *([] if chain_BSLC is None else [chain_BSLC])]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    settings = (window, scale, needs_grad)
    out_BHSC: Tensor = _RolloutAttention.apply(
        query_BHSC, context_BSC, chain_BSLC, sinks_H, start_BS, turn_BSr, *settings
    )
    return out_BHSC


class _RolloutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHSC: Tensor,
        context_BSC: Tensor,
        chain_BSLC: Tensor | None,
        sinks_H: Tensor,
        start_BS: Tensor,
        turn_BSr: Tensor,
        window: int,
        scale: float,
        needs_grad: bool,
    ) -> Tensor:
        query_BSHC = _scaled(query_BHSC, scale)
        key_BSC, chain_LBSC = context_BSC.to(query_BSHC.dtype), _chain_keys(chain_BSLC, query_BSHC.dtype)
        local, slot_S = window - len(chain_LBSC), torch.arange(start_BS.shape[1], device=start_BS.device)
        first_BS1 = torch.maximum(start_BS, slot_S - local + 1).unsqueeze(2)
        own_BSHE = _own_scores(query_BSHC, chain_LBSC, sinks_H)
        outs, weights = [], []
        for rows, reach in _blocks(len(slot_S), local):
            mask_BQX = (slot_S[reach] >= first_BS1[:, rows]) & (slot_S[reach] <= slot_S[rows].unsqueeze(1))
            key_BYC = _extended(key_BSC[:, reach], len(chain_LBSC) + 1)
            weights_BQHY = _weights(query_BSHC[:, rows], key_BYC, mask_BQX, own_BSHE[:, rows])
            outs.append(torch.bmm(weights_BQHY.flatten(1, 2), key_BYC).view(query_BSHC[:, rows].shape))
            own_BSHE[:, rows] = weights_BQHY[..., mask_BQX.shape[2] :]
            if needs_grad:
                weights.append(weights_BQHY)
        out_BSHC = torch.cat(outs, dim=1)
        for number, chain_BSC in enumerate(chain_LBSC):
            out_BSHC.addcmul_(own_BSHE[..., number, None], chain_BSC.unsqueeze(2))
        # The definition rounds before the rotation, too.
        out_BSHC = rotate_in_place_reference(out_BSHC.to(query_BHSC.dtype), turn_BSr.conj().unsqueeze(2))
        out_BHSC = out_BSHC.transpose(1, 2)
        if needs_grad:
            saved = (query_BHSC, context_BSC, chain_BSLC, sinks_H, turn_BSr, out_BHSC, own_BSHE)
            ctx.save_for_backward(*saved, *weights)
        ctx.local, ctx.scale = local, scale
        return out_BHSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        query_BHSC, context_BSC, chain_BSLC, sinks_H, turn_BSr, out_BHSC, own_BSHE, *weights = ctx.saved_tensors
        query_BSHC = _scaled(query_BHSC, ctx.scale)
        key_BSC = context_BSC.to(query_BSHC.dtype)
        grad_out_BSHC = grad_out_BHSC.transpose(1, 2).to(query_BSHC.dtype)
        delta_BSH1 = (grad_out_BSHC * out_BHSC.transpose(1, 2)).sum(-1, keepdim=True)  # both rotated, or neither
        grad_out_BSHC = rotate_reference(grad_out_BSHC, turn_BSr.unsqueeze(2))
        grad_query_BSHC, grad_key_BSC = torch.empty_like(query_BSHC), torch.zeros_like(key_BSC)
        for (rows, reach), weights_BQHY in zip(_blocks(key_BSC.shape[1], ctx.local), weights, strict=True):
            saved = (query_BSHC[:, rows], grad_out_BSHC[:, rows], delta_BSH1[:, rows], weights_BQHY)
            grad_BRC, grad_BXC = _block_backward(key_BSC[:, reach], *(tensor.flatten(1, 2) for tensor in saved))
            grad_query_BSHC[:, rows] = grad_BRC.view(saved[0].shape)
            grad_key_BSC[:, reach] += grad_BXC
        grad_chain = []
        for number, chain_BSC in enumerate(_chain_keys(chain_BSLC, key_BSC.dtype)):
            key_BS1C, weight_BSH1 = chain_BSC.unsqueeze(2), own_BSHE[..., number, None]
            dscore_BSH1 = (grad_out_BSHC * key_BS1C).sum(-1, keepdim=True).sub_(delta_BSH1).mul_(weight_BSH1)
            grad_query_BSHC.addcmul_(dscore_BSH1, key_BS1C)
            grad_chain.append((dscore_BSH1 * query_BSHC).addcmul_(weight_BSH1, grad_out_BSHC).sum(2))
        grad_sinks_H = -(own_BSHE[..., -1] * delta_BSH1[..., 0]).sum((0, 1))
        return (
            grad_query_BSHC.mul_(ctx.scale).transpose(1, 2).to(query_BHSC.dtype),
            grad_key_BSC.to(context_BSC.dtype),
            torch.stack(grad_chain, dim=2).to(chain_BSLC.dtype) if grad_chain else None,
            grad_sinks_H.to(sinks_H.dtype),
            *[None] * 5,
        )


def _scaled(query_BHSC: Tensor, scale: float) -> Tensor:
    """Return queries times a factor, [B, S, H, C] in at least float32."""
    dtype = torch.promote_types(query_BHSC.dtype, torch.float32)
    return (query_BHSC.transpose(1, 2).to(dtype) * scale).contiguous()


def _blocks(num_slots: int, local: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the base-step keys in reach of queries that see `local` up to their own."""
    for begin in range(0, num_slots, BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, num_slots)
        yield slice(begin, end), slice(max(begin - local + 1, 0), end)


def _chain_keys(chain_BSLC: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the chain's keys one by one."""
    return () if chain_BSLC is None else chain_BSLC.to(dtype).unbind(2)


def _own_scores(query_BSHC: Tensor, chain_LBSC: tuple[Tensor, ...], sinks_H: Tensor) -> Tensor:
    """Return each query's scores of its chain and its sink, [B, S, H, E]."""
    own_BSHE = query_BSHC.new_empty(*query_BSHC.shape[:3], len(chain_LBSC) + 1)
    for number, chain_BSC in enumerate(chain_LBSC):
        own_BSHE[..., number] = (query_BSHC * chain_BSC.unsqueeze(2)).sum(-1)
    own_BSHE[..., -1] = sinks_H
    return own_BSHE


def _extended(key_BXC: Tensor, count: int) -> Tensor:
    """Return keys with `count` rows of zeros after them, [B, Y, C]."""
    return torch.nn.functional.pad(key_BXC, (0, 0, 0, count))


def _weights(query_BQHC: Tensor, key_BYC: Tensor, mask_BQX: Tensor, own_BQHE: Tensor) -> Tensor:
    """Return the softmax of a block's scores, [B, Q, H, Y].

    Args:
        query_BQHC: queries times the factor on scores.
        key_BYC: keys, then E rows of zeros.
        mask_BQX: bool, True for each key that a query sees.
        own_BQHE: scores of chain and sink.
    """
    num_keys = mask_BQX.shape[2]
    # One KV head: the queries of all heads are rows of one product.
    scores_BQHY = torch.bmm(query_BQHC.flatten(1, 2), key_BYC.mT).view(*query_BQHC.shape[:3], -1)
    scores_BQHY[..., :num_keys].masked_fill_(~mask_BQX.unsqueeze(2), float("-inf"))
    scores_BQHY[..., num_keys:] = own_BQHE
    return scores_BQHY.softmax(-1)


def _block_backward(
    key_BXC: Tensor, query_BRC: Tensor, grad_out_BRC: Tensor, delta_BR1: Tensor, weights_BRY: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a block's scaled queries and of its keys; R = Q * H."""
    key_BYC = _extended(key_BXC, weights_BRY.shape[2] - key_BXC.shape[1])
    dscores_BRY = torch.bmm(grad_out_BRC, key_BYC.mT).sub_(delta_BR1).mul_(weights_BRY)
    grad_key_BYC = torch.bmm(dscores_BRY.mT, query_BRC).baddbmm_(weights_BRY.mT, grad_out_BRC)
    return torch.bmm(dscores_BRY, key_BYC), grad_key_BYC[:, : key_BXC.shape[1]]


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
