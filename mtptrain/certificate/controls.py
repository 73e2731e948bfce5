"""Negative controls: measurements with a known answer."""

# B traces, S slots, K drafted tokens, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import PrefilledPart, decode_step
from mtptrain.backbone.streams import run_backbone
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.evaluation.certificate_result import AllAcceptControl, Controls, ShiftedTargetControl
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import trace_batch
from mtptrain.traces.file import Trace

SPREAD = 4.0  # standard errors: a true control fails by chance in one of 16,000 evaluations
MAX_TEXTS = 32


@torch.inference_mode()
def shifted_target_control(model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace]) -> ShiftedTargetControl:
    """Return the agreement of the head's first step with its own text, and with the text of another prompt.

    The second must be chance: the probability that independent draws from the token frequencies of the two texts (the
    drafts of one, the targets of the other) are equal, averaged over the same pairs of prompts. Otherwise drafts and
    targets are misaligned, or the texts are alike.

    Args:
        model: the backbone.
        stack: the head.
        traces: two or more, or the control is void; texts of fewer than three tokens are left out.
    """
    used = [trace for trace in traces if len(trace.tokens) > 2][:MAX_TEXTS]
    batch = trace_batch(used, model.lm_head.weight.device)
    streams_BSND, _ = run_backbone(model, batch.tokens_BS)
    hidden_BSD = rollout(stack, model.model.embed_tokens, streams_BSND, batch, 1)[0]
    pairs = []
    for row, trace in enumerate(used):
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
    return ShiftedTargetControl(
        agreement=sum(agreement) / len(pairs),
        shifted=sum(shifted) / len(pairs),
        chance=sum(chance) / len(pairs),
        interval=(low, high),
        passed=low <= 0 <= high,
    )


class BackboneProposer:
    """The backbone as its own greedy draft.

    Args:
        model: the backbone.
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model

    def start(self, texts: Texts, draft_length: int, policy: Policy) -> None:
        """See `Proposer`; supports one row and a greedy policy."""
        self.texts, self.draft_length = texts, draft_length
        self.cache = allocate_cache(self.model, 1, texts.max_length, draft_length + 1)
        self.known = 0

    def read(self, part: PrefilledPart) -> None:
        """Do nothing: drafts are computed from a cache of their own."""

    def keep(self, first_B: Tensor, streams_BSND: Tensor) -> None:
        """Do nothing: drafts are computed from a cache of their own."""

    def draft(self, u_BK: Tensor | None) -> Draft:
        """Return the backbone's own next tokens; see `Proposer`."""
        length = int(self.texts.length_B)
        _, hidden_1SD = decode_step(self.model, self.cache, self.texts.tokens_BT[:, self.known : length])
        self.known = length - 1  # the last token is read again, so that no step is ever empty
        tokens = [self.model.lm_head(hidden_1SD[:, -1]).argmax(-1)]
        while len(tokens) < self.draft_length:
            _, hidden_1SD = decode_step(self.model, self.cache, tokens[-1].unsqueeze(1))
            tokens.append(self.model.lm_head(hidden_1SD[:, -1]).argmax(-1))
        self.cache.rewind(self.texts.length_B - 1)
        return Draft(torch.stack(tokens, dim=1), None, torch.tensor([len(tokens)], device=hidden_1SD.device))


@torch.inference_mode()
def all_accept_control(
    model: DeepseekV4ForCausalLM, prompt: list[int], draft_length: int, num_passes: int = 8
) -> AllAcceptControl:
    """Run the real decoding loop with the backbone as its own draft: every pass must emit K + 1 tokens.

    Args:
        model: the backbone.
        prompt: token ids.
        draft_length: K.
        num_passes: passes to run if every draft is accepted.
    """
    limits = Limits(1 + num_passes * (draft_length + 1))
    passes = decode_speculative(model, BackboneProposer(model), [prompt], draft_length, limits).rows[0].passes
    length = sum(record.emitted for record in passes) / len(passes)
    return AllAcceptControl(length, ceiling=draft_length + 1, passed=length == draft_length + 1)


def run_controls(
    model: DeepseekV4ForCausalLM, stacks: dict[str, MtpStack], traces: list[Trace], draft_length: int
) -> Controls:
    """Return the control of the loop at K = `draft_length`, and of every head in `stacks`."""
    all_accept = all_accept_control(model, traces[0].prompt.tokens, draft_length)
    shifted = {name: shifted_target_control(model, stack, traces) for name, stack in stacks.items()}
    passed = all_accept.passed and all(control.passed for control in shifted.values())
    return Controls(passed, all_accept, shifted)
