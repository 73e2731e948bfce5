"""Greedy speculative decoding: draft with the MTP stack, verify in one backbone pass, take rejected tokens back."""

# One row. K drafted tokens, P prompt tokens

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import decode_step, prefill
from mtptrain.decoding.plain import allocate_cache, top_two
from mtptrain.decoding.records import Decoded, Limits, VerifyPass


class Drafts(Protocol):
    """Anything that proposes tokens: an MTP stack (`Drafter`), or a control of known quality."""

    def draft(self, tokens: list[int], streams_1AND: Tensor, length: int) -> list[int]:
        """See `Drafter.draft`."""
        ...


def accepted_prefix(draft: list[int], verified: list[int]) -> int:
    """How many leading drafted tokens the verifier chose itself."""
    for count, (drafted, chosen) in enumerate(zip(draft, verified, strict=False)):
        if drafted != chosen:
            return count
    return len(draft)


def settle_passes(accepted: list[int], draft_length: int, num_tokens: int) -> list[VerifyPass]:
    """Records of the passes that emitted a text of `num_tokens` tokens, the first of which came from the prefill.

    Drafted tokens past the end of the text are not counted, in the loop and in replay alike.

    Args:
        accepted: accepted drafts of each pass, as if the text went on.
        draft_length: tokens a draft, K.
        num_tokens: tokens of the whole text.
    """
    passes, room = [], num_tokens - 1
    for count in accepted:
        kept = min(count, room)
        passes.append(VerifyPass(drafted=min(draft_length, room), accepted=kept, emitted=min(kept + 1, room)))
        room -= passes[-1].emitted
    return passes


@torch.inference_mode()
def decode_speculative(
    model: DeepseekV4ForCausalLM,
    drafter: Drafts,
    prompt_1P: Tensor,
    draft_length: int,
    limits: Limits,
) -> Decoded:
    """Greedy continuation of one prompt, the same tokens that `decode_plain` emits.

    Args:
        model: the backbone, which verifies.
        drafter: drafts; a new one for each text.
        prompt_1P: int64 [1, P].
        draft_length: tokens a draft, K >= 1.
        limits: where the text ends.
    """
    started = time.perf_counter()
    record = Decoded()
    cache = allocate_cache(model, 1, prompt_1P.shape[1] + limits.max_new_tokens + draft_length + 1, draft_length + 1)
    streams_1AND, hidden_1SD = prefill(model, cache, prompt_1P)
    token, gap = top_two(model.lm_head(hidden_1SD[:, -1]))
    record.tokens, record.gaps = token.tolist(), gap.tolist()
    known = prompt_1P[0].tolist() + record.tokens
    accepted_counts: list[int] = []
    while len(record.tokens) < limits.max_new_tokens and record.tokens[-1] not in limits.stop:
        draft = drafter.draft(known, streams_1AND, draft_length)
        block_1S = torch.tensor([[known[-1], *draft]], device=prompt_1P.device)
        streams_1SND, hidden_1SD = decode_step(model, cache, block_1S)
        verified_S, gap_S = top_two(model.lm_head(hidden_1SD[0]))
        verified, gaps = verified_S.tolist(), gap_S.tolist()
        accepted = accepted_prefix(draft, verified)
        accepted_counts.append(accepted)
        new_tokens = verified[: accepted + 1]
        ends = [place + 1 for place, one in enumerate(new_tokens) if one in limits.stop]
        room = min([limits.max_new_tokens - len(record.tokens), *ends])
        record.tokens += new_tokens[:room]
        record.gaps += gaps[: accepted + 1][:room]
        known += new_tokens
        cache.rewind(cache.length_B - (draft_length - accepted))
        streams_1AND = streams_1SND[:, : accepted + 1]
    record.passes = settle_passes(accepted_counts, draft_length, len(record.tokens))
    record.seconds = time.perf_counter() - started
    return record
