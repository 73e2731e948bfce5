"""Replay of drafts that depend on the passes before them, by a walk along the text from pass to pass.

Where modules overwrite their keys (`decoding.wrapped`), a draft depends on where the passes before it began, so no
rollout gives the drafts of all anchors at once. If drafts are greedy, a text has one sequence of passes: a pass keeps
the drafted tokens that the text has, and the next one begins behind them. The walk drafts at these anchors only, with
the code of the loop and the streams of one pass over the text. So it is exact, also for texts that were sampled, and
costs the drafting of the loop without its verify passes. Each draft length has a walk of its own.
"""

# K draft steps, N anchors of a trace, S slots, B = 1 row, D model width

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from mtptrain.backbone.decode import PrefilledPart
from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import Limits
from mtptrain.decoding.texts import Texts
from mtptrain.decoding.wrapped import WrappingProposer
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.margin import token_margin
from mtptrain.traces.file import Trace


def walk(
    model: DeepseekV4ForCausalLM, stack: MtpStack, trace: Trace, streams_BSND: Tensor, steps: int, policy: Policy
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `q_KN`, `confidence_KN` and `margin_KN` of `ReplayDrafts` at the anchors of passes; 0 at other anchors.

    Args:
        model: the backbone.
        stack: the modules.
        trace: the text.
        streams_BSND: the backbone's streams over prompt and text.
        steps: K.
        policy: drafts greedily and wraps at this depth and K.
    """
    prompt, size = len(trace.prompt.tokens), max(len(trace.tokens) - 1, 0)
    text_S = torch.tensor(trace.prompt.tokens + trace.tokens, device=streams_BSND.device)
    texts = Texts([trace.prompt.tokens], Limits(len(trace.tokens)), steps, streams_BSND.device)
    proposer = WrappingProposer(model, stack)
    proposer.start(texts, steps, policy)
    proposer.read(PrefilledPart(slice(0, 1), 0, streams_BSND[:, :prompt], streams_BSND[:, :prompt, 0]))
    match_KN, confidence_KN, margin_KN = np.zeros((3, steps, size))
    anchor = 0
    while anchor < size:
        known = prompt + anchor + 1
        texts.tokens_BT[0, :known] = text_S[:known]  # drafts were written behind the text
        texts.length_B = torch.full_like(texts.prompt_B, known)
        tokens_K = proposer.draft(None).tokens_BK[0]
        room = min(steps, size - anchor)
        kept = int((tokens_K[:room] == text_S[known : known + room]).cumprod(0).sum())
        match_KN[:kept, anchor] = 1
        seen = min(kept + 1, room)  # later steps were conditioned on a token that the text does not have
        confidence_KN[:seen, anchor] = proposer.raw_BKV[0, :seen].float().softmax(-1).amax(-1).double().cpu().numpy()
        margin_K = token_margin(proposer.logits_BKV[0, :seen], text_S[known : known + seen])
        margin_KN[:seen, anchor] = margin_K.cpu().numpy()
        emitted = min(kept + 1, size - anchor)
        proposer.keep(texts.length_B - 1, streams_BSND[:, known - 1 : known - 1 + emitted])
        anchor += emitted
    return match_KN, confidence_KN, margin_KN
