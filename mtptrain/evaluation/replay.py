"""Replay: the verify passes of speculative decoding for every draft length, from one teacher-forced rollout.

Greedy speculative decoding emits the backbone's own greedy text. So its passes can be read off that text: a pass at
anchor i accepts as many drafts as the rollout at i hits in a row, and the next anchor lies one token past them. No
decoding loop runs. docs/evaluation.md derives it.
"""

# B traces, S slots, K draft steps

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.streams import run_backbone
from mtptrain.data.packing import Batch
from mtptrain.decoding.records import VerifyPass
from mtptrain.decoding.speculative import settle_passes
from mtptrain.evaluation.trace import Trace
from mtptrain.mtp.rollout import rollout
from mtptrain.mtp.stack import MtpStack

TRACES_A_BATCH = 16


def trace_batch(traces: list[Trace], device: torch.device) -> Batch:
    """Prompt and continuation of every trace as a row, padded at the end."""
    texts = [trace.prompt.tokens + trace.tokens for trace in traces]
    length = max(len(text) for text in texts)
    tokens_BS = torch.tensor([text + [0] * (length - len(text)) for text in texts], device=device)
    segment_BS = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    position_BS = torch.arange(length, device=device).expand_as(tokens_BS)
    return Batch(tokens_BS, segment_BS, position_BS)


def _hits(model: DeepseekV4ForCausalLM, stack: MtpStack, batch: Batch, steps: int) -> Tensor:
    """Whether step k at anchor i drafts the text's own token t_{i+k+1}: bool [B, K, S]."""
    streams_BSND, _ = run_backbone(model, batch.tokens_BS)
    hits = []
    for step, hidden_BSD in enumerate(rollout(stack, model.model.embed_tokens, streams_BSND, batch, steps), start=1):
        hit_BS = torch.zeros_like(batch.tokens_BS, dtype=torch.bool)
        mask_BS = batch.target_mask(step)
        target_BS = batch.tokens_BS.roll(-(step + 1), dims=1)
        logits = model.lm_head(hidden_BSD[mask_BS].to(model.lm_head.weight.dtype))
        hit_BS[mask_BS] = logits.argmax(-1) == target_BS[mask_BS]
        hits.append(hit_BS)
    return torch.stack(hits, dim=1)


@torch.inference_mode()
def draft_hits(model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace], steps: int) -> list[np.ndarray]:
    """Per trace a bool array [K, S]: entry (k - 1, i) tells whether step k at anchor i drafts the trace's own token."""
    device = model.lm_head.weight.device
    found = []
    for start in range(0, len(traces), TRACES_A_BATCH):
        group = traces[start : start + TRACES_A_BATCH]
        hit_BKS = _hits(model, stack, trace_batch(group, device), steps).cpu().numpy()
        found += [hit_BKS[row, :, : len(trace.prompt.tokens) + len(trace.tokens)] for row, trace in enumerate(group)]
    return found


def replay_passes(hit_KS: np.ndarray, trace: Trace, draft_length: int) -> list[VerifyPass]:
    """The verify passes that greedy speculative decoding makes on a trace.

    Args:
        hit_KS: of this trace, at least `draft_length` steps.
        trace: the text.
        draft_length: tokens a draft, K.
    """
    anchor, last = len(trace.prompt.tokens) - 1, len(trace.prompt.tokens) + len(trace.tokens) - 2
    accepted = []
    while anchor < last:
        hits = hit_KS[:draft_length, anchor]
        count = draft_length if hits.all() else int(hits.argmin())
        accepted.append(count)
        anchor += count + 1
    return settle_passes(accepted, draft_length, len(trace.tokens))
