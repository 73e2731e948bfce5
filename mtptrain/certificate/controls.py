"""Negative controls: measurements with a known answer."""

# B rows, S slots, K drafted tokens, V vocabulary, N residual streams, D model width

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import PrefilledPart, decode_step
from mtptrain.certificate.greedy import expected_ties, most_ties
from mtptrain.certificate.rounding import measure_noise, upstream_logits
from mtptrain.certificate.shifted_target import shifted_target_control
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Decoded, Limits
from mtptrain.decoding.speculative import allocate_cache, decode_speculative
from mtptrain.decoding.texts import Draft, Texts
from mtptrain.evaluation.certificate_result import AllAcceptControl, Controls, Outcome
from mtptrain.mtp.stack import MtpStack
from mtptrain.run.progress import waiting
from mtptrain.traces.file import Trace

PASSES = 8  # of the loop in which the backbone drafts for itself


class BackboneProposer:
    """The backbone as its own greedy draft.

    Args:
        model: the backbone.
    """

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        self.model = model
        self.gaps: list[list[float]] = []  # between the two largest logits of every drafted token, draft by draft

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
        logits = [self.model.lm_head(hidden_1SD[:, -1])]
        tokens = [logits[0].argmax(-1)]
        while len(tokens) < self.draft_length:
            _, hidden_1SD = decode_step(self.model, self.cache, tokens[-1].unsqueeze(1))
            logits.append(self.model.lm_head(hidden_1SD[:, -1]))
            tokens.append(logits[-1].argmax(-1))
        self.cache.rewind(self.texts.length_B - 1)
        top_K2 = torch.cat(logits).float().topk(2).values
        self.gaps.append((top_K2[:, 0] - top_K2[:, 1]).tolist())
        return Draft(torch.stack(tokens, dim=1), None, torch.tensor([len(tokens)], device=hidden_1SD.device))


@torch.inference_mode()
def all_accept_control(model: DeepseekV4ForCausalLM, prompt: list[int], draft_length: int) -> AllAcceptControl:
    """Run the real decoding loop with the backbone as its own draft: every pass must emit K + 1 tokens.

    A draft may be rejected only at a numerical tie of the backbone's two largest logits, within the rounding noise of
    the text, and only so often as the differences of drafting and verifying explain.

    Args:
        model: the backbone.
        prompt: token ids.
        draft_length: K.
    """
    limits = Limits(1 + PASSES * (draft_length + 1))
    proposer = BackboneProposer(model)
    with waiting("control: the backbone drafts for itself", lambda: len(proposer.gaps) / PASSES):
        row = decode_speculative(model, proposer, [prompt], draft_length, limits).rows[0]
    length, ceiling = sum(record.emitted for record in row.passes) / len(row.passes), draft_length + 1
    rejected_gaps, differences_N = _compare_gaps(row, proposer.gaps)
    if not rejected_gaps:
        return AllAcceptControl(length, ceiling, passed=length == ceiling)
    texts = [prompt], [row.tokens]
    noise = measure_noise(lambda: upstream_logits(model, *texts), [model.model], model.lm_head.weight.dtype).gap
    budget = most_ties(expected_ties(np.array(row.gaps), differences_N.clip(max=noise.extreme)))
    passed = max(rejected_gaps) <= noise.extreme and len(rejected_gaps) <= budget
    return AllAcceptControl(length, ceiling, passed, near_ties=len(rejected_gaps), tie_budget=budget)


def _compare_gaps(row: Decoded, drafted_gaps: list[list[float]]) -> tuple[list[float], np.ndarray]:
    """Return the gaps where drafts were rejected, and the absolute differences of both gaps at kept drafts [N]."""
    rejected, differences, first = [], [], 1  # the first token comes from the prefill
    for record, gaps in zip(row.passes, drafted_gaps, strict=True):
        kept = slice(first, first + record.accepted)
        differences += [abs(ours - theirs) for ours, theirs in zip(gaps, row.gaps[kept], strict=False)]
        if record.accepted < min(record.drafted, record.emitted):
            rejected.append(row.gaps[kept.stop])
        first += record.emitted
    return rejected, np.array(differences)


def run_controls(
    model: DeepseekV4ForCausalLM, stacks: dict[str, MtpStack], traces: list[Trace], draft_length: int
) -> Controls:
    """Return the control of the loop at K = `draft_length`, and of every head in `stacks`."""
    all_accept = all_accept_control(model, traces[0].prompt.tokens, draft_length)
    shifted = shifted_target_control(model, stacks, traces, draft_length)
    passed = all_accept.passed and all(control.outcome is not Outcome.failed for control in shifted.values())
    return Controls(passed, all_accept, shifted)
