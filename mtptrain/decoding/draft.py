"""Drafting with an MTP stack, one token at a time, through rings of base-step keys."""

# One row throughout. A anchors of a pass, N residual streams, D model width, X cached and new keys, K draft steps

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import SlidingRing
from mtptrain.config import MAX_DRAFT_LENGTH
from mtptrain.kernels.sink_attention import rollout_attention_reference
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack


class _ModuleCache:
    """Base-step keys of one module, by anchor, and the keys of the draft's own later steps."""

    def __init__(self, block: MtpBlock, depth: int, dtype: torch.dtype, device: torch.device) -> None:
        attention = block.layer.self_attn
        self.window, self.scale, self.sinks_H = block.window, attention.scaling, attention.sinks
        # An anchor is run again at most `depth` times, after later anchors were written.
        size = self.window + MAX_DRAFT_LENGTH + depth + 1
        self.ring = SlidingRing.allocate(1, size, attention.head_dim, dtype, device)
        self.anchors_1A = torch.empty(1, 0, dtype=torch.int64, device=device)
        self.chain: list[Tensor] = []

    def base(self, first: int, count: int) -> None:
        """Announce a base pass over `count` anchors from `first` on."""
        self.anchors_1A = torch.arange(first, first + count, device=self.anchors_1A.device).unsqueeze(0)
        self.chain = []

    def attend_base(self, query_1HAC: Tensor, key_1AC: Tensor) -> Tensor:
        """Attention of base steps over earlier anchors' keys and each other's; stores the new keys."""
        known_1R = self.ring.positions(self.anchors_1A[:, 0])
        mask_1AX = self._mask(torch.cat([known_1R, self.anchors_1A], dim=1), self.anchors_1A, num_chain=0)
        context_1XC = torch.cat([self.ring.values_BRC, key_1AC], dim=1)
        out = rollout_attention_reference(query_1HAC, context_1XC, None, self.sinks_H, mask_1AX, self.scale)
        self.ring.write(self.ring.slots(self.anchors_1A), key_1AC)
        return out

    def attend_chain(self, query_1H1C: Tensor, key_11C: Tensor) -> Tensor:
        """Attention of a later step at the last anchor over base-step keys and its own chain."""
        self.chain.append(key_11C)
        last_11 = self.anchors_1A[:, -1:]
        mask_11X = self._mask(self.ring.positions(last_11[:, 0] + 1), last_11, num_chain=len(self.chain))
        return rollout_attention_reference(
            query_1H1C,
            self.ring.values_BRC,
            torch.stack(self.chain, dim=2),
            self.sinks_H,
            mask_11X,
            self.scale,
        )

    def _mask(self, key_1X: Tensor, anchor_1A: Tensor, num_chain: int) -> Tensor:
        age_1AX = anchor_1A.unsqueeze(2) - key_1X.unsqueeze(1)
        return (age_1AX >= 0) & (age_1AX < self.window - num_chain) & (key_1X >= 0).unsqueeze(1)


class Drafter:
    """Drafts the continuation of one row.

    Step k <= depth is module k's base step: it runs over every anchor whose base-step key is not final yet. Module d's
    key of anchor j needs token t_{j+d}, so after a draft at anchor i the last depth - 1 anchors run again, with true
    tokens instead of drafted ones. Steps beyond the depth run at the last anchor only.

    Args:
        model: the frozen backbone, for its embedding and lm_head.
        stack: the modules.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack) -> None:
        self.model, self.stack = model, stack
        weight = model.lm_head.weight
        self.caches = [
            _ModuleCache(stack.block(d), stack.depth, weight.dtype, weight.device) for d in range(1, stack.depth + 1)
        ]
        self.final = 0
        self.pending_1AND: Tensor | None = None

    def draft(self, tokens: list[int], streams_1AND: Tensor, length: int) -> list[int]:
        """Greedy draft.

        Args:
            tokens: all known tokens t_0..t_{i+1}.
            streams_1AND: backbone streams of the anchors since the last call, up to anchor i.
            length: tokens to draft, K.

        Returns:
            The K drafted token ids, candidates for t_{i+2}, t_{i+3}, ...
        """
        anchor = len(tokens) - 2
        streams = streams_1AND if self.pending_1AND is None else torch.cat([self.pending_1AND, streams_1AND], dim=1)
        assert self.final + streams.shape[1] == anchor + 1, "streams must reach the anchor without a gap"
        sequence, state = list(tokens), streams
        for step in range(1, length + 1):
            state = self._step(step, anchor, sequence, state)
            hidden_D = self.stack.block(step).hidden(state[:, -1:])[0, 0]
            sequence.append(self.choose(hidden_D, len(sequence)))
        settled = max(self.final, anchor + 2 - self.stack.depth)
        self.pending_1AND = streams[:, settled - self.final :]
        self.final = settled
        return sequence[len(tokens) :]

    def choose(self, hidden_D: Tensor, place: int) -> int:
        """The token drafted for slot `place`: the head's likeliest."""
        return int(self.model.lm_head(hidden_D).argmax())

    def _step(self, step: int, anchor: int, sequence: list[int], state_1AND: Tensor) -> Tensor:
        block, cache = self.stack.block(step), self.caches[self.stack.base_step(step) - 1]
        is_base = self.stack.base_step(step) == step
        first = self.final if is_base else anchor
        if is_base:
            cache.base(first, anchor + 1 - first)
        else:
            state_1AND = state_1AND[:, -1:]
        device = state_1AND.device
        token_1A = torch.tensor([sequence[first + step : anchor + step + 1]], device=device)
        position_1A = torch.arange(first + step - 1, anchor + step, device=device).unsqueeze(0)
        embedding_1AD = self.model.model.embed_tokens(token_1A)
        return block(embedding_1AD, state_1AND, position_1A, cache.attend_base if is_base else cache.attend_chain)
