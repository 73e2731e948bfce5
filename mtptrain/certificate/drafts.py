"""The drafts of the real loop, held against the rollout that training and replay run."""

# B rows, K drafted tokens, V vocabulary, D model width

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.certificate.differences import Differences, both_quantities
from mtptrain.certificate.rounding import Logits, measure_noise, read_logits
from mtptrain.decoding.draft import MtpProposer
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.speculative import decode_speculative
from mtptrain.decoding.texts import Draft
from mtptrain.evaluation.certificate_result import RoundingNoise
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import Rollout, trace_batch
from mtptrain.traces.file import Trace
from mtptrain.traces.prompts import Prompt

NEW_TOKENS = 8  # of the texts whose drafts are compared
SAMPLED = Policy(temperature=1.0)  # greedy drafts keep no logits


class RecordedDrafts(MtpProposer):
    """The drafter of the loop, which also keeps every draft with the text before it.

    Args:
        model: the backbone.
        stack: the modules.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, stack: MtpStack) -> None:
        super().__init__(model, stack)
        self.drafts: dict[int, dict[int, tuple[list[int], list[int], Tensor]]] = {}

    def draft(self, u_BK: Tensor | None) -> Draft:
        """Return the draft; see `Proposer`."""
        draft = super().draft(u_BK)
        assert draft.logits_BKV is not None, "a draft whose tokens are certain has no logits"
        for row, length in enumerate(self.texts.length_B.tolist()):
            if self.texts.is_open[row]:
                text = self.texts.tokens_BT[row, :length].tolist()
                drafted = draft.tokens_BK[row].tolist(), draft.logits_BKV[row].clone()
                self.drafts.setdefault(row, {})[length] = (text, *drafted)
        return draft


def against_rollout(
    model: DeepseekV4ForCausalLM,
    name: str,
    stack: MtpStack,
    prompts: list[list[int]],
    length: int,
    draft: Rollout = rollout,
) -> tuple[list[Differences], RoundingNoise]:
    """Compare the drafts of the real loop with the rollout that training and replay run.

    Args:
        model: the backbone.
        name: of the head.
        stack: the head.
        prompts: short ones: only then do all keys of the prompt lie in the module's sliding window.
        length: K.
        draft: the rollout, or one with a fault, to show that the comparison finds it.

    Returns:
        The differences of the drafts on the loop's own texts, prompt by prompt, and the rounding noise of the head.
    """
    proposer = RecordedDrafts(model, stack)
    decode_speculative(model, proposer, prompts, length, Limits(NEW_TOKENS), SAMPLED)
    rows = [one for number in sorted(proposer.drafts) for one in proposer.drafts[number].values()]
    ends = [0, *np.cumsum([len(proposer.drafts[number]) for number in sorted(proposer.drafts)]).tolist()]
    looped = [read_logits(logits_KV, tokens) for _, tokens, logits_KV in rows]

    def compute() -> list[Logits]:
        return _joined(_rollout_logits(model, stack, rows, length, draft), ends)

    noise = measure_noise(compute, [model.model, stack], model.lm_head.weight.dtype)
    pairs = list(zip(_joined(looped, ends), compute(), strict=True))
    return list(both_quantities(f"drafts of the {name} head, K={length}", "the rollout", pairs, noise)), noise


@torch.inference_mode()
def _rollout_logits(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    rows: list[tuple[list[int], list[int], Tensor]],
    length: int,
    draft: Rollout,
) -> list[Logits]:
    """Return the logits of drafted tokens from a rollout over each text and its draft."""
    traces = [Trace(Prompt(text, "", 0), tokens, [], []) for text, tokens, _ in rows]
    batch = trace_batch(traces, model.lm_head.weight.device)
    streams_BSND, _ = run_backbone(model, batch.tokens_BS)
    states = draft(stack, model.model.embed_tokens, streams_BSND, batch, length)
    logits = []
    for number, (text, tokens, _) in enumerate(rows):
        hidden_KD = torch.stack([state_BSD[number, len(text) - 2] for state_BSD in states[: len(tokens)]])
        logits.append(read_logits(model.lm_head(hidden_KD.to(model.lm_head.weight.dtype)), tokens))
    return logits


def _joined(logits: list[Logits], ends: list[int]) -> list[Logits]:
    """Join the logits of all drafts of a prompt."""
    return [
        Logits(
            np.concatenate([one.gap_N for one in logits[begin:end]]),
            np.concatenate([one.log_p_N for one in logits[begin:end]]),
        )
        for begin, end in pairwise(ends)
    ]
