"""Drafting with stacked modules as vLLM does past their depth: the modules start again, and overwrite their keys.

A pass runs every draft step over a window of anchors. Step k is module (k - 1) % depth, and leaves its keys in place of
those of the module's earlier step. So the step-1 keys of module 0 live for one step only: the next pass attends to the
keys of the last step that ran the module, except in its own window. The window holds the last K anchors, or all K + 1
new ones if every draft was accepted; it holds the whole prompt in the first pass. RoPE positions are the anchors, at
every step.

Source: vLLM's `vllm/v1/worker/gpu/spec_decode/multi_module_mtp/speculator.py` (Model Runner V2), as read.
"""

# B rows, T slots of a row, A anchors of a window, N residual streams, D model width, H heads, C head width, K draft
# steps, V vocabulary, r channel pairs that are rotated

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import PrefilledPart
from mtptrain.decoding.draft import MtpProposer, Proposer
from mtptrain.decoding.penalties import count_context
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.kernels.acceptance import sample_logits
from mtptrain.kernels.sink_attention import masked_attention
from mtptrain.mtp.block import MtpBlock
from mtptrain.mtp.stack import MtpStack


def head_proposer(model: DeepseekV4ForCausalLM, stack: MtpStack, policy: Policy, draft_length: int) -> Proposer:
    """Return the proposer of a head's drafts under a policy."""
    if policy.wraps(stack.depth, draft_length):
        return WrappingProposer(model, stack)
    return MtpProposer(model, stack)


class _Keys:
    """The keys of one module in one row, by anchor.

    Args:
        block: the module.
        slots: T.
        like: a tensor of the keys' dtype and device.
    """

    def __init__(self, block: MtpBlock, slots: int, like: Tensor) -> None:
        attention = block.layer.self_attn
        self.window, self.scale, self.sinks_H = block.window, attention.scaling, attention.sinks
        self.values_TC = torch.zeros(slots, attention.head_dim, dtype=like.dtype, device=like.device)

    def attend(self, anchor_A: Tensor, query_BHAC: Tensor, key_BAC: Tensor, turn_BAr: Tensor) -> Tensor:
        """Store the keys of a window of anchors in place of earlier ones, and return the attention over all keys."""
        self.values_TC[anchor_A] = key_BAC[0]
        low = max(0, int(anchor_A[0]) - self.window + 1)
        known_X = torch.arange(low, int(anchor_A[-1]) + 1, device=anchor_A.device)
        age_AX = anchor_A.unsqueeze(1) - known_X
        mask_BAX = ((age_AX >= 0) & (age_AX < self.window)).unsqueeze(0)
        keys_BXC = self.values_TC[known_X].unsqueeze(0)
        return masked_attention(query_BHAC, keys_BXC, None, self.sinks_H, mask_BAX, turn_BAr, scale=self.scale)


class WrappingProposer:
    """A `Proposer` whose stacked modules start again past their depth; each row drafts alone, eagerly.

    Args:
        model: the frozen backbone, for its embedding and lm_head.
        stack: the modules.

    Attributes:
        raw_BKV: the head's logits of the newest draft, before the policy; zeros in rows that have ended.
        logits_BKV: the same under the policy.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack) -> None:
        self.model, self.stack = model, stack

    def start(self, texts: Texts, draft_length: int, policy: Policy) -> None:
        """See `Proposer`; the policy has no confidence threshold."""
        self.texts, self.draft_length, self.policy = texts, draft_length, policy
        weight, config, batch = self.model.lm_head.weight, self.model.config, len(texts.lengths)
        shape = batch, texts.max_length, config.hc_mult, config.hidden_size
        self.streams_BTND = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        blocks = [self.stack.block(d) for d in range(1, self.stack.depth + 1)]
        self.keys = [[_Keys(block, texts.max_length, weight) for block in blocks] for _ in range(batch)]
        self.first, self.known = [0] * batch, [0] * batch  # of the newest window, and tokens known to it

    def read(self, part: PrefilledPart) -> None:
        """See `Proposer`. The first draft runs over the whole prompt."""
        end = part.first + part.streams_BSND.shape[1]
        self.streams_BTND[part.rows, part.first : end] = part.streams_BSND

    def keep(self, first_B: Tensor, streams_BSND: Tensor) -> None:
        """See `Proposer`."""
        for row, first in enumerate(first_B.tolist()):
            self.streams_BTND[row, first : first + streams_BSND.shape[1]] = streams_BSND[row]

    def draft(self, u_BK: Tensor | None) -> Draft:
        """See `Proposer`."""
        texts, lengths = self.texts, self.texts.length_B.tolist()
        shape = len(lengths), self.draft_length, len(self.model.lm_head.weight)
        logits_BKV = self.model.lm_head.weight.new_zeros(shape)
        tokens_BK = texts.tokens_BT.new_zeros(shape[:2])
        self.raw_BKV, self.logits_BKV = torch.zeros_like(logits_BKV), logits_BKV
        for row in [row for row, is_open in enumerate(texts.is_open) if is_open]:
            draws_K = None if u_BK is None else u_BK[row : row + 1]
            self._draft_row(row, lengths[row], draws_K, tokens_BK[row], logits_BKV[row])
        drafted_B = torch.tensor(texts.is_open, device=texts.length_B.device) * self.draft_length
        is_certain = u_BK is None or self.policy.draws_greedily
        return Draft(tokens_BK, None if is_certain else logits_BKV, drafted_B)

    def _window(self, row: int, length: int) -> Tensor:
        """Return the anchors of a pass, int64; those of the pass before if it is drafted again."""
        if length != self.known[row]:
            self.first[row] = max(0, length - 1 - max(self.draft_length, length - self.known[row]))
            self.known[row] = length
        return torch.arange(self.first[row], length - 1, device=self.streams_BTND.device)

    def _draft_row(self, row: int, length: int, u_1K: Tensor | None, tokens_K: Tensor, logits_KV: Tensor) -> None:
        """Write the drafted tokens of a row and their logits under the policy."""
        anchor_A = self._window(row, length)
        state_BAND = self.streams_BTND[row, anchor_A].unsqueeze(0)
        for step in range(self.draft_length):
            module = step % self.stack.depth
            block, keys = self.stack.block(module + 1), self.keys[row][module]
            token_BA = self.texts.tokens_BT[row, anchor_A + step + 1].unsqueeze(0)
            state_BAND = block(
                self.model.model.embed_tokens(token_BA),
                state_BAND,
                anchor_A.unsqueeze(0) + module,  # RoPE is relative, so a shift of all positions of a module is none
                lambda query, key, turn, keys=keys: keys.attend(anchor_A, query, key, turn),
            )
            hidden_1D = block.hidden(state_BAND[:, -1:])[:, 0]
            self.raw_BKV[row, step] = self.model.lm_head(hidden_1D.to(self.model.lm_head.weight.dtype))[0]
            logits_KV[step] = self._adjust(row, length + step, self.raw_BKV[row, step].unsqueeze(0))[0]
            if u_1K is None or self.policy.draws_greedily:
                tokens_K[step] = logits_KV[step].argmax()
            else:
                tokens_K[step] = sample_logits(logits_KV[step : step + 1], self.policy.sampling, u_1K[:, step])[0]
            self.texts.tokens_BT[row, length + step] = tokens_K[step]

    def _adjust(self, row: int, length: int, logits_1V: Tensor) -> Tensor:
        """Return the logits after the policy's penalties and min-p, given the first `length` tokens of the row."""
        if not self.policy.penalties.are_on:
            return self.policy.adjust(logits_1V, None)
        tokens_1T, prompt_1 = self.texts.tokens_BT[row : row + 1], self.texts.prompt_B[row : row + 1]
        length_1 = torch.full_like(prompt_1, length)
        return self.policy.adjust(logits_1V, count_context(tokens_1T, prompt_1, length_1, logits_1V.shape[-1]))
