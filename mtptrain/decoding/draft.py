"""Incremental drafting with an MTP stack, independent in every row, with base-step keys in ring buffers.

All state is addressed by slot: the values of a rejected draft are overwritten when their slots are decoded again.
"""

# B rows, S slots of a prompt or pass, A anchors of a pass, N residual streams, D model width, H heads, C head width,
# X cached and new keys, K draft steps, V vocabulary, r channel pairs that are rotated

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import SlidingRing
from mtptrain.backbone.decode import PrefilledPart
from mtptrain.decoding.penalties import count_context
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.steps import Eager, Recordable, Step, make_step
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.errors import UserError
from mtptrain.kernels.acceptance import sample_logits
from mtptrain.kernels.sink_attention import masked_attention
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.numerics import AS_TRAINED, Numerics
from mtptrain.mtp.stack import MtpStack


class Proposer(Protocol):
    """Proposes tokens for verification: an MTP stack (`MtpProposer`) or a control of known quality."""

    def start(self, texts: Texts, draft_length: int, policy: Policy) -> None:
        """Prepare for new texts, which grow during decoding; drafts have at most `draft_length` tokens."""
        ...

    def read(self, part: PrefilledPart) -> None:
        """Take in a part of the prompts with its streams."""
        ...

    def keep(self, first_B: Tensor, streams_BSND: Tensor) -> None:
        """Take in the streams of slots first_B onward after a verify pass.

        Slots past the end of the texts hold the streams of rejected tokens.
        """
        ...

    def draft(self, u_BK: Tensor | None) -> Draft:
        """Propose a continuation of every text. Must be idempotent: recording steps makes the first draft twice.

        Args:
            u_BK: float64 uniform draws; None for a greedy policy.
        """
        ...


class _ModuleCache:
    """Base-step keys of one module, by anchor, and the keys of the later steps of the current draft.

    Args:
        block: the module.
        batch: B.
        slack: slots beyond the window: the largest distance of a pass's first anchor behind the highest anchor written.
        like: a tensor of the keys' dtype and device.
    """

    def __init__(self, block: MtpBlock, batch: int, slack: int, like: Tensor) -> None:
        attention = block.layer.self_attn
        self.window, self.scale, self.sinks_H = block.window, attention.scaling, attention.sinks
        self.ring = SlidingRing.allocate(batch, self.window + slack, attention.head_dim, like.dtype, like.device)
        self.chain: list[Tensor] = []
        self.extra_B1C: Tensor | None = None  # a key at position -1

    def attend_base(
        self, rows: slice, anchor_BA: Tensor, query_BHAC: Tensor, key_BAC: Tensor, turn_BAr: Tensor
    ) -> Tensor:
        """Return a base step's attention over the keys of earlier anchors and of this pass; store the new keys."""
        self.chain = []
        ring = self.ring.rows(rows)
        known_BX = torch.cat([ring.positions(anchor_BA[:, 0]), anchor_BA], dim=1)
        context_BXC = torch.cat([ring.values_BRC, key_BAC], dim=1)
        mask_BAX = self._mask(known_BX, anchor_BA, num_chain=0)
        context_BXC, mask_BAX = self._with_extra(rows, context_BXC, anchor_BA, mask_BAX, num_chain=0)
        out = masked_attention(query_BHAC, context_BXC, None, self.sinks_H, mask_BAX, turn_BAr, scale=self.scale)
        ring.write(ring.slots(anchor_BA), key_BAC)
        return out

    def attend_chain(self, anchor_B1: Tensor, query_BH1C: Tensor, key_B1C: Tensor, turn_B1r: Tensor) -> Tensor:
        """Return a later step's attention at the last anchor, over the base-step keys and the draft's own chain."""
        self.chain.append(key_B1C)
        mask_B1X = self._mask(self.ring.positions(anchor_B1[:, 0] + 1), anchor_B1, num_chain=len(self.chain))
        chain_B1LC = torch.stack(self.chain, dim=2)
        keys_BXC, everything = self.ring.values_BRC, slice(None)
        keys_BXC, mask_B1X = self._with_extra(everything, keys_BXC, anchor_B1, mask_B1X, num_chain=len(self.chain))
        return masked_attention(query_BH1C, keys_BXC, chain_B1LC, self.sinks_H, mask_B1X, turn_B1r, scale=self.scale)

    def _with_extra(
        self, rows: slice, keys_BXC: Tensor, anchor_BA: Tensor, mask_BAX: Tensor, num_chain: int
    ) -> tuple[Tensor, Tensor]:
        """Return keys and mask with the extra key, if there is one, while it lies in the window."""
        if self.extra_B1C is None:
            return keys_BXC, mask_BAX
        sees_BA1 = (anchor_BA + 1 < self.window - num_chain).unsqueeze(2)
        return torch.cat([keys_BXC, self.extra_B1C[rows]], dim=1), torch.cat([mask_BAX, sees_BA1], dim=2)

    def _mask(self, key_BX: Tensor, anchor_BA: Tensor, num_chain: int) -> Tensor:
        age_BAX = anchor_BA.unsqueeze(2) - key_BX.unsqueeze(1)
        return (age_BAX >= 0) & (age_BAX < self.window - num_chain) & (key_BX >= 0).unsqueeze(1)


class MtpProposer:
    """Drafts the continuations of a batch of texts with an MTP stack.

    Step k <= depth is module k's base step: it runs over every anchor whose base-step key is not final yet. Module d's
    key of anchor j needs token t_{j+d}, so after a draft at anchor i the last depth - 1 anchors run again, with emitted
    tokens instead of drafted ones. Steps beyond the depth run at the last anchor only.

    Rows emit different numbers of tokens. A pass runs the same number of anchors in every row, enough for the row with
    the most new tokens, and ends at each row's newest anchor. In the other rows it recomputes the same keys for anchors
    that were already final. Slots before the start of a short text are masked.

    Args:
        model: the frozen backbone, for its embedding and lm_head.
        stack: the modules.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack) -> None:
        self.model, self.stack = model, stack

    def start(self, texts: Texts, draft_length: int, policy: Policy) -> None:
        """See `Proposer`.

        Raises:
            UserError: the policy starts the modules again past their depth; `decoding.wrapped` drafts under it.
        """
        if policy.wraps(self.stack.depth, draft_length):
            raise UserError(
                f"decoding.past_depth={policy.past_depth.value}: keys of {self.stack.depth} modules are overwritten at "
                f"K={draft_length}, and this proposer keeps them; take the one of `decoding.wrapped.head_proposer`"
            )
        draft_length = policy.drafted_steps(self.stack.depth, draft_length)
        self.texts, self.draft_length, self.policy = texts, draft_length, policy
        weight, config = self.model.lm_head.weight, self.model.config
        batch, depth = len(texts.lengths), self.stack.depth
        # Anchors lie at most K + depth behind the newest one and drafts K ahead of it.
        slack = 2 * (draft_length + 1) + depth
        self.num_base = min(depth, draft_length)
        self.caches = [_ModuleCache(self.stack.block(d), batch, slack, weight) for d in range(1, self.num_base + 1)]
        if self.stack.numerics.extra_key:
            self.caches[0].extra_B1C = self._extra_key()
        width = config.hc_mult * config.hidden_size
        self.streams = SlidingRing.allocate(batch, slack, width, weight.dtype, weight.device)
        self.shape_ND = (config.hc_mult, config.hidden_size)
        self.step = self._make_step()

    def _extra_key(self) -> Tensor:
        """Return the key of each text's first token and a state of zeros, at position -1."""
        first_B1 = torch.zeros_like(self.texts.tokens_BT[:, :1])
        keys: list[Tensor] = []

        def attend(query_BHAC: Tensor, key_BAC: Tensor, _turn_BAr: Tensor) -> Tensor:
            keys.append(key_BAC)
            return query_BHAC  # the output is unused

        embedding_B1D = self._embed(slice(None), first_B1)
        state_B1ND = embedding_B1D.new_zeros(
            *embedding_B1D.shape[:2], self.model.config.hc_mult, embedding_B1D.shape[2]
        )
        self.stack.block(1)(embedding_B1D, state_B1ND, first_B1 - 1, attend)
        return keys[0]

    def _make_step(self) -> Step:
        """Return the whole draft as a step of static shapes, or eager with a server's numerics, which need hooks.

        On a CPU a draft that ends early saves more than a trace, so a policy with a confidence threshold has none.
        """
        if self.stack.numerics not in (AS_TRAINED, Numerics(zero_first=True)):
            return Eager(self._propose)
        rings = [self.streams, *(cache.ring for cache in self.caches)]
        draft = Recordable(
            self._propose,
            modules=[self.stack, self.model.model.embed_tokens, self.model.lm_head],
            state=[self.texts.tokens_BT, self.texts.prompt_B, *(ring.values_BRC for ring in rings)],
            constants=("draft", self.policy, self.draft_length, self.stack.numerics),
            calls=self.texts.num_passes,
        )
        step = make_step(self.model, draft)
        return Eager(self._propose) if self.policy.min_confidence > 0 and not step.records_first else step

    def read(self, part: PrefilledPart) -> None:
        """See `Proposer`. The first draft recomputes the keys of the last anchors, whose tokens are not known yet."""
        state_BSND = part.streams_BSND
        batch, count = state_BSND.shape[:2]
        slot_S = torch.arange(part.first, part.first + count, device=state_BSND.device)
        anchor_BS = slot_S.expand(batch, -1)
        self._store(part.rows, anchor_BS, state_BSND)
        for step in range(1, self.num_base + 1):
            state_BSND = self._base_step(step, part.rows, anchor_BS, state_BSND)

    def keep(self, first_B: Tensor, streams_BSND: Tensor) -> None:
        """See `Proposer`."""
        slot_S = torch.arange(streams_BSND.shape[1], device=first_B.device)
        self._store(slice(None), first_B.unsqueeze(1) + slot_S, streams_BSND)

    def draft(self, u_BK: Tensor | None) -> Draft:
        """See `Proposer`."""
        texts = self.texts
        active_B = torch.tensor(texts.is_open, device=texts.length_B.device)
        if self.step.is_static:
            draws = () if u_BK is None else (u_BK,)
            tokens_BK, drafted_B, *logits = self.step(texts.length_B, active_B, *draws)
            return Draft(tokens_BK, logits[0] if logits else None, drafted_B)
        draft = self.propose(texts.length_B, active_B, u_BK, texts.newest)
        if self.policy.min_confidence == 0:
            return draft
        longest = int(draft.drafted_B.max())
        logits_BKV = None if draft.logits_BKV is None or longest == 0 else draft.logits_BKV[:, :longest]
        return Draft(draft.tokens_BK[:, :longest], logits_BKV, draft.drafted_B)

    def _propose(self, length_B: Tensor, active_B: Tensor, u_BK: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the tensors of `propose`."""
        draft = self.propose(length_B, active_B, u_BK)
        logits = () if draft.logits_BKV is None else (draft.logits_BKV,)
        return draft.tokens_BK, draft.drafted_B, *logits

    def propose(
        self, length_B: Tensor, active_B: Tensor, u_BK: Tensor | None = None, newest: int | None = None
    ) -> Draft:
        """Return the draft, with all K tokens unless every row has stopped by confidence before.

        Args:
            length_B: int64, known tokens of each text.
            active_B: bool, True for rows that draft.
            u_BK: float64 draws; None for a greedy policy.
            newest: most tokens that a row gained in the last pass. None assumes the largest possible number and drafts
                all K tokens, as a recorded step needs: no shape depends on the texts, and nothing waits for the device.
        """
        anchor_B1 = (length_B - 2).unsqueeze(1)
        num_anchors = (self.draft_length + 1 if newest is None else newest) + self.num_base - 1
        anchor_BA = anchor_B1 - torch.arange(num_anchors - 1, -1, -1, device=anchor_B1.device)
        state = self._load(anchor_BA)
        drafted_B = torch.zeros_like(length_B)
        is_certain = u_BK is None or self.policy.draws_greedily
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        for step in range(1, self.draft_length + 1):
            if step <= self.num_base:
                state = self._base_step(step, slice(None), anchor_BA, state)
            else:
                state = self._chain_step(step, anchor_B1, state[:, -1:])
            logits_BV = self.logits(step, state)
            if self.policy.min_confidence > 0:
                active_B = active_B & (logits_BV.float().softmax(-1).amax(-1) >= self.policy.min_confidence)
                # Base steps run to the end, because later drafts need the keys of their anchors.
                if newest is not None and step >= self.num_base and not bool(active_B.any()):
                    break
            logits_BV = self._adjust(logits_BV, length_B + step - 1)
            if u_BK is None or is_certain:
                token_B = logits_BV.argmax(-1)
            else:
                token_B = sample_logits(logits_BV, self.policy.sampling, u_BK[:, step - 1])
            self.texts.tokens_BT.scatter_(1, (length_B + step - 1).unsqueeze(1), token_B.unsqueeze(1))
            drafted_B = drafted_B + active_B
            tokens.append(token_B)
            logits.append(logits_BV)
        if not tokens:
            return Draft.nothing(drafted_B)
        return Draft(torch.stack(tokens, 1), None if is_certain else torch.stack(logits, 1), drafted_B)

    def logits(self, step: int, state_BAND: Tensor) -> Tensor:
        """Return the logits [B, V] of a step at the last anchor."""
        hidden_BD = self.stack.block(step).hidden(state_BAND[:, -1:])[:, 0]
        return self.model.lm_head(hidden_BD.to(self.model.lm_head.weight.dtype))

    def _adjust(self, logits_BV: Tensor, length_B: Tensor) -> Tensor:
        """Return the logits after the policy's penalties and min-p, given the first `length_B` tokens of each text."""
        if not self.policy.penalties.are_on:
            return self.policy.adjust(logits_BV, None)
        texts = self.texts
        context = count_context(texts.tokens_BT, texts.prompt_B, length_B, logits_BV.shape[-1])
        return self.policy.adjust(logits_BV, context)

    def _base_step(self, step: int, rows: slice, anchor_BA: Tensor, state_BAND: Tensor) -> Tensor:
        attend = partial(self.caches[step - 1].attend_base, rows, anchor_BA)
        embedding_BAD = self._embed(rows, anchor_BA + step)
        return self.stack.block(step)(embedding_BAD, state_BAND, anchor_BA + (step - 1), attend)

    def _chain_step(self, step: int, anchor_B1: Tensor, state_B1ND: Tensor) -> Tensor:
        attend = partial(self.caches[self.stack.base_step(step) - 1].attend_chain, anchor_B1)
        embedding_B1D = self._embed(slice(None), anchor_B1 + step)
        return self.stack.block(step)(embedding_B1D, state_B1ND, anchor_B1 + (step - 1), attend)

    def _embed(self, rows: slice, slot_BA: Tensor) -> Tensor:
        """Return the embeddings of the tokens at some slots; arbitrary for slots outside the texts."""
        tokens_BT = self.texts.tokens_BT[rows]
        return self.model.model.embed_tokens(tokens_BT.gather(1, slot_BA.clamp(0, tokens_BT.shape[1] - 1)))

    def _store(self, rows: slice, slot_BS: Tensor, streams_BSND: Tensor) -> None:
        ring = self.streams.rows(rows)
        ring.write(ring.slots(slot_BS), streams_BSND.flatten(2))

    def _load(self, slot_BA: Tensor) -> Tensor:
        ring = self.streams
        return ring.values_BRC.flatten(0, 1)[ring.slots(slot_BA)].view(*slot_BA.shape, *self.shape_ND)
