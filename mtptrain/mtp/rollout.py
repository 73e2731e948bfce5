"""K draft steps at every anchor at once, exactly as they are served.

In serving, the keys before an anchor come from true backbone streams (base-step entries); only the draft's own slots
hold entries of later steps. So step k at anchor i attends the base-step keys of slots up to i, then its own chain's
later keys, all inside the sliding window. docs/rollout.md has the picture.
"""

# B rows, S slots, N residual streams, D model width, C head width, L chain keys, K draft steps

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtptrain.batch import Batch
from mtptrain.kernels.sink_attention import document_starts, rollout_attention
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack

Embed = Callable[[Tensor], Tensor]  # token_BS -> embedding_BSD


class StepAttention:
    """Attention of one step, after the steps of its module whose keys it is given: the base step's, then the chain's.

    Attributes:
        key_BSC: this step's own keys, once it has run.
    """

    def __init__(self, block: MtpBlock, segment_BS: Tensor, earlier: list[Tensor]) -> None:
        self.block, self.segment_BS, self.earlier = block, segment_BS, earlier
        self.key_BSC: Tensor | None = None

    def __call__(self, query_BHSC: Tensor, key_BSC: Tensor) -> Tensor:
        """Output of the queries; keeps the keys."""
        self.key_BSC = key_BSC
        context_BSC, *chain = [*self.earlier, key_BSC]
        chain_BSLC = torch.stack(chain, dim=2) if chain else None
        attention = self.block.layer.self_attn
        return rollout_attention(
            query_BHSC,
            context_BSC,
            chain_BSLC,
            attention.sinks,
            document_starts(self.segment_BS),
            window=self.block.window,
            scale=attention.scaling,
        )


Step = Callable[[MtpBlock, int, Tensor, Tensor, Tensor, StepAttention], Tensor]  # block, k, its inputs -> state


def run_block(
    block: MtpBlock, step: int, embedding_BSD: Tensor, state_BSND: Tensor, position_BS: Tensor, attend: StepAttention
) -> Tensor:
    """Draft step `step` as it is trained and served: the block on exactly these inputs."""
    return block(embedding_BSD, state_BSND, position_BS, attend)


def _run_step(
    run_step: Step,
    block: MtpBlock,
    batch: Batch,
    step: int,
    earlier: list[Tensor],
    embedding_BSD: Tensor,
    state_BSND: Tensor,
) -> tuple[Tensor, Tensor]:
    """State after a step, and its keys."""
    attend = StepAttention(block, batch.segment_BS, earlier)
    state_BSND = run_step(block, step, embedding_BSD, state_BSND, batch.position_BS + (step - 1), attend)
    assert attend.key_BSC is not None
    return state_BSND, attend.key_BSC


def rollout(
    stack: MtpStack,
    embedding: Embed,
    streams_BSND: Tensor,
    batch: Batch,
    steps: int,
    choose: Callable[[int, Tensor], Tensor] | None = None,
    recompute: bool = False,
    run_step: Step = run_block,
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
        recompute: keep only each step's input for the backward, and run the step again there.
        run_step: computes one step; the wrong wirings that a head is diagnosed with change its inputs.

    Returns:
        K tensors [B, S, D]: entry k - 1 at anchor i is the input of the lm_head for q_i^k, the distribution of token
        t_{i+k+1}. Anchors without that target (`batch.target_mask(k)`) hold values of no meaning.
    """
    assert choose is None or stack.depth == 1, "later modules' base-step keys would come from drafted tokens"
    hidden: list[Tensor] = []
    state_BSND = streams_BSND
    keys: list[Tensor] = []
    for step in range(1, steps + 1):
        block = stack.block(step)
        if stack.base_step(step) == step:
            keys = []
        token_BS = batch.tokens_BS.roll(-step, dims=1)
        if choose is not None and step > 1:
            token_BS = choose(step - 1, hidden[-1])
        arguments = (run_step, block, batch, step, keys, embedding(token_BS), state_BSND)
        if recompute:
            state_BSND, key_BSC = checkpoint(_run_step, *arguments, use_reentrant=False)
        else:
            state_BSND, key_BSC = _run_step(*arguments)
        keys = [*keys, key_BSC]
        hidden.append(block.hidden(state_BSND))
    return hidden
