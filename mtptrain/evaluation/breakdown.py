"""Where acceptance comes from and where it is lost: sums of replay's chances over kinds of drafted tokens.

Step k of a draft at anchor n is verified with chance visit(n) begun_k(n) and kept with chance visit(n) r_k(n). Every
count is a sum of these over steps and anchors, so the buckets of any kind add up to the totals of replay. A miss at
position k loses the tokens k, k + 1, ... of the draft that lay inside the text; where no threshold stops drafts, lost
and accepted tokens together are the drafted ones.
"""

# K draft steps, N anchors of a trace

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.drafts import TraceDrafts
from mtptrain.evaluation.expected import inside_text
from mtptrain.evaluation.head_result import Breakdown, Bucket, BucketKind, DraftedTokens
from mtptrain.evaluation.replay import trace_chances
from mtptrain.evaluation.token_class import CLASSES, token_classes
from mtptrain.evaluation.trace import Trace

CONTEXT_EDGES = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]  # tokens before the anchor's pass
GENERATED_EDGES = [16, 64, 256, 1024, 4096]  # tokens of the continuation before the pass
ENTROPY_EDGES = [0.1, 0.5, 1.0, 2.0, 4.0]  # nats


def break_down(
    traces: list[Trace], drafts: list[TraceDrafts], policy: Policy, draft_length: int, tokenizer: Tokenizer
) -> Breakdown:
    """Return verified, accepted and lost drafted tokens by kind, at one draft length.

    Args:
        traces: the texts.
        drafts: of the traces, in their order.
        policy: how drafts are verified and stopped.
        draft_length: K.
        tokenizer: the backbone's, for the class of a token.
    """
    cells: dict[BucketKind, dict[str, np.ndarray]] = {}
    totals = np.zeros(3)
    for trace, one in zip(traces, drafts, strict=True):
        counts_3KN = _counts(one, policy, draft_length)
        totals += counts_3KN.sum((1, 2))
        for kind, labels_KN in _labels(trace, one, draft_length, tokenizer).items():
            found = cells.setdefault(kind, {})
            for label in np.unique(labels_KN):
                found[label] = found.get(label, np.zeros(3)) + counts_3KN[:, labels_KN == label].sum(1)
    order = _bucket_order(draft_length, [trace.prompt.domain for trace in traces])
    by = {
        kind: [_bucket(label, found[label], totals) for label in order[kind] if label in found and found[label][0] > 0]
        for kind, found in cells.items()
    }
    return Breakdown(draft_length, DraftedTokens(*totals.tolist()), by)


def _counts(drafts: TraceDrafts, policy: Policy, draft_length: int) -> np.ndarray:
    """Expected verified, accepted and lost tokens of every step and anchor, [3, K, N]."""
    chances = trace_chances(drafts, policy)
    visit_N = chances.visit_LN[draft_length - 1]
    begun_KN, reach_KN = chances.begun_KN[:draft_length], chances.reach_KN[:draft_length]
    inside_KN = inside_text(draft_length, len(visit_N))
    left_KN = inside_KN[::-1].cumsum(0)[::-1]  # tokens of a full draft from step k on
    return visit_N * np.stack([begun_KN, reach_KN, (begun_KN - reach_KN) * left_KN])


def _labels(trace: Trace, drafts: TraceDrafts, draft_length: int, tokenizer: Tokenizer) -> dict[BucketKind, np.ndarray]:
    """The bucket of every step and anchor, by kind, str [K, N]; past the end of the text they mean nothing."""
    num_anchors = len(drafts.p_N)
    shape = (draft_length, num_anchors)
    prompt = len(trace.prompt.tokens)
    step_K1, anchor_N = np.arange(1, draft_length + 1)[:, None], np.arange(num_anchors)
    token_KN = np.minimum(step_K1 - 1 + anchor_N, max(num_anchors - 1, 0))
    classes_N = np.array(token_classes(tokenizer, trace.prompt.tokens + trace.tokens, prompt + 1), dtype=object)
    entropy_N = np.array(bucket_names(ENTROPY_EDGES), dtype=object)[np.digitize(drafts.entropy_N, ENTROPY_EDGES)]
    context_N = np.array(bucket_names(CONTEXT_EDGES), dtype=object)[np.digitize(prompt + 1 + anchor_N, CONTEXT_EDGES)]
    generated_N = np.array(bucket_names(GENERATED_EDGES), dtype=object)[np.digitize(1 + anchor_N, GENERATED_EDGES)]
    return {
        BucketKind.position: np.broadcast_to(step_K1.astype(str).astype(object), shape),
        BucketKind.domain: np.full(shape, trace.prompt.domain, dtype=object),
        BucketKind.context: np.broadcast_to(context_N, shape),
        BucketKind.generated: np.broadcast_to(generated_N, shape),
        BucketKind.token_class: classes_N[token_KN],
        BucketKind.entropy: entropy_N[token_KN],
    }


def bucket_names(edges: Sequence[float]) -> list[str]:
    """Names of the buckets between edges: [1, 4] -> below 1, 1 to 4, 4 and more."""
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and more"]


def _bucket_order(draft_length: int, domains: list[str]) -> dict[BucketKind, list[str]]:
    return {
        BucketKind.position: [str(k) for k in range(1, draft_length + 1)],
        BucketKind.domain: list(dict.fromkeys(domains)),
        BucketKind.context: bucket_names(CONTEXT_EDGES),
        BucketKind.generated: bucket_names(GENERATED_EDGES),
        BucketKind.token_class: CLASSES,
        BucketKind.entropy: bucket_names(ENTROPY_EDGES),
    }


def _bucket(label: str, counts_3: np.ndarray, totals_3: np.ndarray) -> Bucket:
    reached, accepted, lost = counts_3.tolist()
    return Bucket(
        bucket=label,
        reached=reached,
        accepted=accepted,
        lost=lost,
        acceptance=accepted / reached,
        lost_share=lost / float(totals_3[2]) if totals_3[2] > 0 else 0.0,
    )
