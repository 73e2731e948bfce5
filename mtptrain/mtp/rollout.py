"""Run K draft steps at every anchor at once, exactly as a server runs them.

In serving, the keys before an anchor come from true backbone streams (base-step entries); only the slots of the draft
hold entries of later steps. So step k at anchor i attends to the base-step keys of slots up to i, then to later keys of
the same chain, all inside the sliding window. docs/rollout.md has a diagram.
"""

# B rows, S slots, N residual streams, D model width, C head width, L chain keys, K draft steps,
# r channel pairs that are rotated

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
Choose = Callable[[int, Tensor], Tensor]  # k, states_BSD -> token_BS


class StepAttention:
    """Attention of one step over the keys of earlier steps of its module, base step first, and its own keys.

    Attributes:
        key_BSC: keys of this step; None before it has run.
    """

    def __init__(self, block: MtpBlock, segment_BS: Tensor, earlier: list[Tensor]) -> None:
        self.block, self.segment_BS, self.earlier = block, segment_BS, earlier
        self.key_BSC: Tensor | None = None

    def __call__(self, query_BHSC: Tensor, key_BSC: Tensor, turn_BSr: Tensor) -> Tensor:
        """Return the attention output of the queries, rotated back, and keep the keys."""
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
            turn_BSr,
            window=self.block.window,
            scale=attention.scaling,
        )


Step = Callable[[MtpBlock, int, Tensor, Tensor, Tensor, StepAttention], Tensor]  # block, k, its inputs -> state


def run_block(
    block: MtpBlock, step: int, embedding_BSD: Tensor, state_BSND: Tensor, position_BS: Tensor, attend: StepAttention
) -> Tensor:
    """Run draft step `step` as in training and serving: the block on exactly these inputs."""
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
    """Return the state after a step, and the step's keys."""
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
    choose: Choose | None = None,
    recompute: bool = False,
    run_step: Step = run_block,
) -> list[Tensor]:
    """Return the draft states of every anchor, teacher-forced or along the tokens that `choose` picks.

    Args:
        stack: the modules.
        embedding: the backbone's token embedding.
        streams_BSND: the backbone's streams h_i, before hc_head.
        batch: the packed tokens; no step sees across a document boundary.
        steps: number of draft steps K.
        choose: picks the token of step k from (k, draft states [B, S, D]), int64 [B, S]; step k + 1 then reads it
            instead of the text's token. Valid for one module only: the base-step keys of a deeper one would come from
            drafted tokens.
        recompute: keep only each step's input for the backward pass, and run the step again there.
        run_step: computes one step; diagnosis replaces it to change a step's inputs.

    Returns:
        K tensors [B, S, D]: entry k - 1 at anchor i is the input of the lm_head for q_i^k, the distribution of token
        t_{i+k+1}. Anchors without that target (`batch.target_mask(k)`) hold meaningless values.

    Where the modules compute with an extra key (`mtp.numerics`), rows of one document have it; packed rows do not.
    """
    assert choose is None or stack.depth == 1, "later modules' base-step keys would come from drafted tokens"
    if stack.numerics.extra_key and int(batch.segment_BS.max()) == 1:
        streams_BSND, batch, choose = _with_extra_slot(streams_BSND, batch, choose)
        states = _rollout(stack, embedding, streams_BSND, batch, steps, choose, recompute, run_step)
        return [state_BSD[:, 1:] for state_BSD in states]
    return _rollout(stack, embedding, streams_BSND, batch, steps, choose, recompute, run_step)


def _with_extra_slot(streams_BSND: Tensor, batch: Batch, choose: Choose | None) -> tuple[Tensor, Batch, Choose | None]:
    """Return the arguments of a rollout with a slot of zeros before the first, whose next token is the first one."""
    before_B1 = torch.zeros_like(batch.tokens_BS[:, :1])
    streams_BSND = torch.cat([torch.zeros_like(streams_BSND[:, :1]), streams_BSND], dim=1)
    extended = Batch(
        torch.cat([before_B1, batch.tokens_BS], dim=1),
        torch.cat([batch.segment_BS[:, :1], batch.segment_BS], dim=1),
        torch.cat([batch.position_BS[:, :1] - 1, batch.position_BS], dim=1),
    )
    if choose is None:
        return streams_BSND, extended, None
    return streams_BSND, extended, lambda step, state: torch.cat([before_B1, choose(step, state[:, 1:])], dim=1)


def _rollout(
    stack: MtpStack,
    embedding: Embed,
    streams_BSND: Tensor,
    batch: Batch,
    steps: int,
    choose: Choose | None,
    recompute: bool,
    run_step: Step,
) -> list[Tensor]:
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
