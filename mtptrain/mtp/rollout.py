"""K draft steps at every anchor at once, exactly as they are served.

In serving, the keys before an anchor come from true backbone streams (base-step entries); only the draft's own slots
hold entries of later steps. So step k at anchor i attends the base-step keys of slots up to i, then its own chain's
later keys, all inside the sliding window. docs/rollout.md has the picture.
"""

# B rows, S slots, N residual streams, D model width, C head width, L chain keys, K draft steps

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtptrain.data.packing import Batch
from mtptrain.kernels.sink_attention import context_mask, rollout_attention_reference
from mtptrain.mtp.stack import MtpStack


class _StepAttention:
    """Attention of the steps of one module: remembers its base-step keys and its chain's keys."""

    def __init__(self, segment_BS: Tensor, window: int, scale: float, sinks_H: Tensor) -> None:
        self.segment_BS, self.window, self.scale, self.sinks_H = segment_BS, window, scale, sinks_H
        self.context_BSC: Tensor | None = None
        self.chain: list[Tensor] = []

    def __call__(self, query_BHSC: Tensor, key_BSC: Tensor) -> Tensor:
        if self.context_BSC is None:
            self.context_BSC = key_BSC
        else:
            self.chain.append(key_BSC)
        chain_BSLC = torch.stack(self.chain, dim=2) if self.chain else None
        mask_BSS = context_mask(self.segment_BS, self.window, len(self.chain))
        return rollout_attention_reference(query_BHSC, self.context_BSC, chain_BSLC, self.sinks_H, mask_BSS, self.scale)


def rollout(
    stack: MtpStack,
    embedding: nn.Module,
    streams_BSND: Tensor,
    batch: Batch,
    steps: int,
    choose: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Draft states of every anchor: teacher-forced, or along the tokens that `choose` takes.

    Args:
        stack: the modules.
        embedding: the backbone's token embedding.
        streams_BSND: the backbone's streams h_i, before hc_head.
        batch: the packed tokens; no step sees across a boundary.
        steps: draft steps K.
        choose: takes the token that step k drafts from (k, draft states [B, S, D]), int64 [B, S]: step k + 1 is fed
            with it instead of the text's own. For one module only: the base-step keys of a deeper one would come from
            drafted tokens.

    Returns:
        K tensors [B, S, D]: entry k - 1 at anchor i is the input of the lm_head for q_i^k, the distribution of token
        t_{i+k+1}. Anchors without that target (`batch.target_mask(k)`) hold values of no meaning.
    """
    assert choose is None or stack.depth == 1, "later modules' base-step keys would come from drafted tokens"
    hidden: list[Tensor] = []
    state_BSND = streams_BSND
    attend: _StepAttention | None = None
    for step in range(1, steps + 1):
        block = stack.block(step)
        if stack.base_step(step) == step:
            attention = block.layer.self_attn
            attend = _StepAttention(batch.segment_BS, block.window, attention.scaling, attention.sinks)
        assert attend is not None
        token_BS = batch.tokens_BS.roll(-step, dims=1)
        if choose is not None and step > 1:
            token_BS = choose(step - 1, hidden[-1])
        embedding_BSD = embedding(token_BS)
        state_BSND = block(embedding_BSD, state_BSND, batch.position_BS + (step - 1), attend)
        hidden.append(block.hidden(state_BSND))
    return hidden
