"""Plain and speculative decoding: draft, verify in one backbone pass and rewind rejected tokens, row by row.

Plain decoding is the same loop with an empty draft.
"""

# B rows, T slots per row, V vocabulary, K drafted tokens, L = K + 1 verified positions, N residual streams,
# D model width

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.cache import BackboneCache
from mtptrain.backbone.decode import prefill
from mtptrain.backbone.placement import layer_devices
from mtptrain.decoding.draft import Proposer
from mtptrain.decoding.draws import Draws, row_seed
from mtptrain.decoding.policy import GREEDY, Policy
from mtptrain.decoding.results import Clock, DecodedBatch, Limits, NewTokens
from mtptrain.decoding.steps import verify_step
from mtptrain.decoding.texts import Draft, Texts, verify
from mtptrain.errors import UserError
from mtptrain.kernels.acceptance import Emission


def decode_plain(
    model: DeepseekV4ForCausalLM,
    prompts: list[list[int]],
    limits: Limits,
    policy: Policy = GREEDY,
    seeds: list[int] | None = None,
) -> DecodedBatch:
    """Return continuations of the prompts, decoded one token per pass; see `decode_speculative`."""
    return decode_speculative(model, None, prompts, 0, limits, policy, seeds)


def decode_speculative(
    model: DeepseekV4ForCausalLM,
    proposer: Proposer | None,
    prompts: list[list[int]],
    draft_length: int,
    limits: Limits,
    policy: Policy = GREEDY,
    seeds: list[int] | None = None,
) -> DecodedBatch:
    """Return continuations of the prompts, distributed as the backbone's own under the policy.

    A greedy text equals that of plain decoding, up to numerical ties. A sampled text has the distribution of plain
    decoding but not its tokens, because the random draws are consumed in a different order. Each row has draws of its
    own, so its text does not depend on the rows decoded beside it.

    Args:
        model: the backbone, which verifies.
        proposer: makes the drafts; None decodes plainly.
        prompts: token ids, at least one each; lengths may differ.
        draft_length: most tokens of a draft, K; 0 without a proposer.
        limits: the end of each text.
        policy: sampling, drafting, verification and confidence stop.
        seeds: one per row, for a policy that samples; by default those of a run of seed 0.

    Raises:
        UserError: a prompt is empty, too long or of another vocabulary.
    """
    decoding = begin_decoding(model, proposer, prompts, draft_length, limits, policy, seeds)
    for _ in decoding.passes():
        pass
    return decoding.finish()


@torch.inference_mode()
def begin_decoding(
    model: DeepseekV4ForCausalLM,
    proposer: Proposer | None,
    prompts: list[list[int]],
    draft_length: int,
    limits: Limits,
    policy: Policy = GREEDY,
    seeds: list[int] | None = None,
) -> Decoding:
    """Return the decoding of `decode_speculative` before its first pass, to follow it pass by pass.

    Raises:
        UserError: a prompt is empty, too long or of another vocabulary.
    """
    _check_token_ids(model, prompts, limits)
    assert (proposer is None) == (draft_length == 0), "draft_length must be 0 exactly when there is no proposer"
    texts = Texts(prompts, limits, draft_length, model.lm_head.weight.device)
    seeds = seeds or [row_seed(0, number) for number in range(len(prompts))]
    return Decoding(model, proposer, texts, draft_length, policy, seeds)


def _check_token_ids(model: DeepseekV4ForCausalLM, prompts: list[list[int]], limits: Limits) -> None:
    """Raise a `UserError` unless the backbone can continue the prompts."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not prompts:
        raise UserError("prompts=[]: there is nothing to continue; give at least one prompt")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompts: prompt {number} is empty; give it at least one token")
        if len(prompt) + limits.max_new_tokens > context:
            raise UserError(
                f"decoding.max_new_tokens={limits.max_new_tokens}: prompt {number} has {len(prompt)} tokens and the "
                f"backbone was built for {context}; shorten the prompt or lower decoding.max_new_tokens"
            )
        unknown = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise UserError(
                f"prompts: prompt {number} holds token {unknown} and the backbone knows 0 to {vocabulary - 1}; use the "
                "backbone's own tokenizer"
            )


def allocate_cache(model: DeepseekV4ForCausalLM, batch: int, max_length: int, max_step: int) -> BackboneCache:
    """Return an empty cache in the model's dtype and on its devices.

    Args:
        model: the backbone.
        batch: rows.
        max_length: slots per row.
        max_step: most tokens of one verify step, K + 1 for K drafts.
    """
    weight = model.lm_head.weight
    cache = BackboneCache.allocate(model.config, batch, max_length, max_step, weight.dtype, weight.device)
    cache.spread(layer_devices(model))
    return cache


class Decoding:
    """A batch during decoding; `begin_decoding` makes one.

    Args:
        model: the backbone.
        proposer: makes the drafts; None decodes plainly.
        texts: the prompts, which grow.
        draft_length: K.
        policy: shared by all rows.
        seeds: one per row; unused by a greedy policy.
    """

    def __init__(
        self,
        model: DeepseekV4ForCausalLM,
        proposer: Proposer | None,
        texts: Texts,
        draft_length: int,
        policy: Policy,
        seeds: list[int],
    ) -> None:
        device = texts.tokens_BT.device
        self.clock = Clock(device)
        self.model, self.proposer, self.texts, self.policy = model, proposer, texts, policy
        self.draws: Draws | None = None
        if not policy.is_greedy:
            self.draws = Draws(seeds, texts.lengths, texts.limits.max_new_tokens, draft_length, device)
        self.cache = allocate_cache(model, len(texts.lengths), texts.max_length, draft_length + 1)
        self.verify_pass = verify_step(model, self.cache, texts.num_passes)
        self.empty_draft = Draft.nothing(torch.zeros_like(texts.length_B))
        if proposer is not None:
            proposer.start(texts, draft_length, policy)

    @torch.inference_mode()
    def passes(self) -> Iterator[list[NewTokens | None]]:
        """Decode, and yield the new tokens of each row after every pass, the prompts' own first.

        The clock stands still while the caller looks at them.
        """
        self.read_prompts()
        self.record()
        yield self.texts.news
        self.clock.pause()
        while any(self.texts.is_open):
            self.advance()
            yield self.texts.news
            self.clock.pause()

    def finish(self) -> DecodedBatch:
        """Return the texts, as far as they were decoded, and the time that it took."""
        return DecodedBatch(self.texts.finish(), self.clock.stop())

    def read_prompts(self) -> None:
        """Prefill backbone and proposer, and emit each row's first token."""
        hidden: list[Tensor | None] = [None] * len(self.texts.lengths)
        for part in prefill(self.model, self.cache, self.texts.tokens_BT, self.texts.lengths):
            if self.proposer is not None:
                self.proposer.read(part)
            end = part.first + part.hidden_BSD.shape[1]
            for index, row in enumerate(range(len(hidden))[part.rows]):
                if end == self.texts.lengths[row]:
                    hidden[row] = part.hidden_BSD[index, -1:]
        self.clock.lap("prefill")
        hidden_B1D = torch.stack([last_1D for last_1D in hidden if last_1D is not None])
        self.texts.emit(self._verify(self.empty_draft, self.model.lm_head(hidden_B1D)), None)
        self.clock.lap("sample")

    def record(self) -> None:
        """Record draft and verify pass before the first timed pass, on a GPU.

        The draft made here is made again by the first pass, so `Proposer.draft` must be idempotent.
        """
        if not self.verify_pass.records_first or not any(self.texts.is_open):
            return
        self.verify_pass(torch.cat([self.texts.last_B1, self._draft().tokens_BK], dim=1))
        self.cache.rewind(self.texts.length_B - 1)
        self.clock.lap("record")

    def advance(self) -> None:
        """Run one pass: draft, verify, emit, and rewind rejected tokens."""
        texts, clock = self.texts, self.clock
        draft = self._draft()
        clock.lap("draft")
        first_B = texts.length_B - 1
        tokens_BL = torch.cat([texts.last_B1, draft.tokens_BK], dim=1)
        streams_BLND, logits_BLV = self.verify_pass(tokens_BL)
        clock.lap("verify")
        texts.emit(self._verify(draft, logits_BLV), None if self.proposer is None else draft)
        clock.lap("sample")
        self.cache.rewind(texts.length_B - 1)
        if self.proposer is not None:
            self.proposer.keep(first_B, streams_BLND)
        clock.lap("rewind")

    def _draft(self) -> Draft:
        if self.proposer is None:
            return self.empty_draft
        return self.proposer.draft(None if self.draws is None else self.draws.draft(self.texts.emitted_B))

    def _verify(self, draft: Draft, logits_BLV: Tensor) -> Emission:
        draws = self.draws
        u_BL = None if draws is None else draws.verify(self.texts.emitted_B, draft.tokens_BK.shape[1])
        return verify(self.policy, draft, self.texts.adjust(self.policy, draft, logits_BLV), u_BL)
