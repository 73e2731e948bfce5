"""Plain greedy decoding through the same engine that verifies drafts: the baseline of every comparison."""

# B rows, P prompt tokens, V vocabulary

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import decode_step, prefill
from mtptrain.decoding.records import Decoded, Limits


def allocate_cache(model: DeepseekV4ForCausalLM, batch: int, max_length: int, max_step: int) -> BackboneCache:
    """An empty cache in the model's dtype and on its device."""
    weight = model.lm_head.weight
    return BackboneCache.allocate(model.config, batch, max_length, max_step, weight.dtype, weight.device)


def top_two(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy token int64 [B] and the gap to the second largest logit float32 [B]; the lower id wins a tie."""
    values_B2 = logits_BV.float().topk(2, dim=-1).values
    return logits_BV.argmax(-1), values_B2[:, 0] - values_B2[:, 1]


@torch.inference_mode()
def decode_plain(model: DeepseekV4ForCausalLM, prompt_BP: Tensor, limits: Limits) -> list[Decoded]:
    """Greedy continuations of prompts of one length.

    Args:
        model: the backbone.
        prompt_BP: int64 prompts.
        limits: where a row ends.

    Returns:
        One record a row; `seconds` is that of the whole batch.
    """
    started = time.perf_counter()
    batch, length = prompt_BP.shape
    cache = allocate_cache(model, batch, length + limits.max_new_tokens, 1)
    _, hidden_BSD = prefill(model, cache, prompt_BP)
    rows = [Decoded() for _ in range(batch)]
    open_rows = set(range(batch))
    for index in range(limits.max_new_tokens):
        token_B, gap_B = top_two(model.lm_head(hidden_BSD[:, -1]))
        for row, (token, gap) in enumerate(zip(token_B.tolist(), gap_B.tolist(), strict=True)):
            if row in open_rows:
                rows[row].tokens.append(token)
                rows[row].gaps.append(gap)
                if token in limits.stop:
                    open_rows.discard(row)
        if not open_rows or index == limits.max_new_tokens - 1:
            break
        _, hidden_BSD = decode_step(model, cache, token_B.unsqueeze(1))
    for record in rows:
        record.seconds = time.perf_counter() - started
    return rows
