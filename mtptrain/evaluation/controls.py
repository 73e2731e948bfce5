"""Negative controls: what must come out when the answer is known."""

# B traces, S slots, K drafted tokens, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import decode_step, prefill
from mtptrain.backbone.streams import run_backbone
from mtptrain.decoding.plain import allocate_cache
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.evaluation.drafts import trace_batch
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack

SPREAD = 4.0  # standard errors: a control that always holds fails by chance in one of 16,000 evaluations


@torch.inference_mode()
def shifted_target_control(model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace]) -> dict[str, Any]:
    """Agreement of the head's first step with the text it drafts for, and with the text of another prompt.

    The second must be chance: the probability that independent draws from the two texts' own token frequencies (the
    drafts' on one side, the targets' on the other) are equal, averaged over the same pairs of prompts. Otherwise drafts
    and targets are not what they are said to be, or the texts are alike.

    Args:
        model: the backbone.
        stack: the head.
        traces: at least two tell something; texts of fewer than three tokens are left out.

    Returns:
        `agreement`, `shifted`, `chance`, the `interval` of shifted minus chance and `passed`.
    """
    told = [trace for trace in traces if len(trace.tokens) > 2][:32]
    batch = trace_batch(told, model.lm_head.weight.device)
    streams_BSND, _ = run_backbone(model, batch.tokens_BS)
    hidden_BSD = rollout(stack, model.model.embed_tokens, streams_BSND, batch, 1)[0]
    pairs = []
    for row, trace in enumerate(told):
        first, last = len(trace.prompt.tokens) - 1, len(trace.prompt.tokens) + len(trace.tokens) - 2
        logits = model.lm_head(hidden_BSD[row, first:last].to(model.lm_head.weight.dtype))
        pairs.append((logits.argmax(-1), batch.tokens_BS[row, first + 2 : last + 2]))
    agreement = [float((draft == target).double().mean()) for draft, target in pairs]
    away = len(pairs) // 2
    shifted, chance = [], []
    for number, (draft, _) in enumerate(pairs):
        other = pairs[(number + away) % len(pairs)][1]
        size = min(len(draft), len(other))
        shifted.append(float((draft[:size] == other[:size]).double().mean()))
        chance.append(float((draft[:size, None] == other[None, :size]).double().mean()))
    gap = torch.tensor(shifted).double() - torch.tensor(chance).double()
    error = float(gap.std() / len(pairs) ** 0.5) if len(pairs) > 2 else 1.0
    low, high = float(gap.mean()) - SPREAD * error, float(gap.mean()) + SPREAD * error
    return {
        "agreement": sum(agreement) / len(pairs),
        "shifted": sum(shifted) / len(pairs),
        "chance": sum(chance) / len(pairs),
        "interval": [low, high],
        "passed": low <= 0 <= high,
    }


class BackboneDrafts:
    """The backbone as its own draft, for one text of at most `max_length` tokens.

    Args:
        model: the backbone.
        max_length: tokens of prompt and continuation.
        draft_length: K.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, max_length: int, draft_length: int) -> None:
        self.model, self.known = model, 0
        self.cache = allocate_cache(model, 1, max_length + draft_length + 1, draft_length + 1)

    def draft(self, tokens: list[int], streams_1AND: Tensor, length: int) -> list[int]:
        """The backbone's own next `length` tokens; see `Drafts`."""
        new_1S = torch.tensor([tokens[self.known :]], device=streams_1AND.device)
        read = prefill if self.known == 0 else decode_step
        _, hidden_1SD = read(self.model, self.cache, new_1S)
        self.known = len(tokens)
        drafted = [int(self.model.lm_head(hidden_1SD[0, -1]).argmax())]
        while len(drafted) < length:
            _, hidden_1SD = decode_step(self.model, self.cache, torch.tensor([[drafted[-1]]], device=new_1S.device))
            drafted.append(int(self.model.lm_head(hidden_1SD[0, -1]).argmax()))
        self.cache.rewind(self.cache.length_B - (length - 1))
        return drafted


@torch.inference_mode()
def all_accept_control(
    model: DeepseekV4ForCausalLM, prompt: list[int], draft_length: int, num_passes: int = 8
) -> dict[str, Any]:
    """The real decoding loop with the backbone as its own draft: every pass must emit K + 1 tokens.

    Args:
        model: the backbone.
        prompt: token ids.
        draft_length: K.
        num_passes: passes that an always accepted draft needs.

    Returns:
        `acceptance_length`, the `ceiling` K + 1, and `passed`: they are equal.
    """
    new_tokens = 1 + num_passes * (draft_length + 1)
    prompt_1P = torch.tensor([prompt], device=model.lm_head.weight.device)
    drafts = BackboneDrafts(model, len(prompt) + new_tokens, draft_length)
    passes = decode_speculative(model, drafts, prompt_1P, draft_length, new_tokens).passes
    length = sum(one.emitted for one in passes) / len(passes)
    return {"acceptance_length": length, "ceiling": draft_length + 1, "passed": length == draft_length + 1}
