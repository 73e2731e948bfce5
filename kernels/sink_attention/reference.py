"""Definition of the MTP rollout's attention: what a draft step sees when it is served.

Shared keys and values, one KV head, a learned sink a head. The query of a step that is `L` steps past its module's base
step, at anchor i, sees the base-step keys of slots i + L - W < j <= i of its own document, then its chain's own L keys:
W keys in all, the sliding window of the decoder layer.
"""

# B rows, S anchors, X base-step keys, H heads, C head width, L chain keys of an anchor, W window

from __future__ import annotations

import torch
from torch import Tensor


def context_mask(segment_BS: Tensor, window: int, num_chain: int) -> Tensor:
    """Which base-step keys each anchor sees, bool [B, S, S] (anchor, key)."""
    num_slots = segment_BS.shape[1]
    slots = torch.arange(num_slots, device=segment_BS.device)
    distance_SS = slots[:, None] - slots[None, :]
    near_SS = (distance_SS >= 0) & (distance_SS < window - num_chain)
    return near_SS & (segment_BS[:, :, None] == segment_BS[:, None, :])


def rollout_attention_reference(
    query_BHSC: Tensor,
    context_BXC: Tensor,
    chain_BSLC: Tensor | None,
    sinks_H: Tensor,
    mask_BSX: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one rollout step at every anchor.

    Args:
        query_BHSC: queries, RoPE applied.
        context_BXC: base-step keys (= values), RoPE applied.
        chain_BSLC: keys of each anchor's own later steps, the query's own last; None at the base step.
        sinks_H: logit of each head's sink.
        mask_BSX: bool, which base-step keys an anchor sees; `context_mask` in training.
        scale: factor on the scores.

    Returns:
        [B, H, S, C] in the queries' dtype; softmax in float32.

    Source: DeepSeek-V4 sliding attention; serving order of keys as in vLLM and SGLang, see docs/rollout.md.
    """
    num_keys = context_BXC.shape[1]
    query, context = query_BHSC.float(), context_BXC.float()
    scores = torch.matmul(query, context.transpose(1, 2).unsqueeze(1)) * scale
    scores = scores.masked_fill(~mask_BSX.unsqueeze(1), float("-inf"))
    parts = [scores]
    if chain_BSLC is not None:
        chain = chain_BSLC.float()
        parts.append(torch.matmul(query.transpose(1, 2), chain.transpose(2, 3)).transpose(1, 2) * scale)
    parts.append(sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    out = torch.matmul(weights[..., :num_keys], context.unsqueeze(1))
    if chain_BSLC is not None:
        out = out + torch.matmul(weights[..., num_keys:-1].transpose(1, 2), chain).transpose(1, 2)
    return out.to(query_BHSC.dtype)
