"""Sources and losses of acceptance: replay's chances by kind of drafted token, by confidence and by threshold.

Step k of a draft at anchor n is verified with chance visit(n) begun_k(n) and kept with chance visit(n) r_k(n). Every
count is a sum of these over steps and anchors, so the buckets of any kind add up to the totals of replay. A rejection
at position k loses the tokens k, k + 1, ... of the draft that lay inside the text; if no threshold stops drafts, lost
and accepted tokens together are the drafted ones.

`break_down` sorts these counts into buckets, `calibrate` compares them with the head's confidence, and
`sweep_thresholds` replays drafts that end below a confidence.
"""

# K draft steps, N anchors of a trace, X steps of all anchors and traces

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from mtptrain.config import PastDepth
from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.head_result import (
    Breakdown,
    Bucket,
    BucketKind,
    Calibration,
    CalibrationBin,
    DraftedTokens,
    Threshold,
)
from mtptrain.evaluation.metrics import by_position, passes_and_tokens
from mtptrain.kernels.acceptance import Verification
from mtptrain.replay.drafts import ReplayDrafts
from mtptrain.replay.markov import acceptance_probability, inside_text
from mtptrain.replay.replay import replay_all, trace_chances
from mtptrain.traces.file import Trace

CONTEXT_EDGES = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]  # tokens before the anchor's pass
GENERATED_EDGES = [16, 64, 256, 1024, 4096]  # tokens of the continuation before the pass
ENTROPY_EDGES = [0.1, 0.5, 1.0, 2.0, 4.0]  # nats
CLASSES = ["word start", "inside word", "digits", "punctuation", "whitespace", "indentation", "part of a character"]
LOOK_BACK = 8  # tokens before, enough to see the start of a line and the end of a word
NUM_BINS = 10  # of the confidence
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)


def break_down(
    traces: list[Trace], drafts: list[ReplayDrafts], policy: Policy, draft_length: int, tokenizer: Tokenizer
) -> Breakdown:
    """Return verified, accepted and lost drafted tokens by kind, at one draft length.

    Args:
        traces: the texts.
        drafts: of the traces, in their order.
        policy: how drafts are verified and stopped.
        draft_length: K.
        tokenizer: the backbone's, for the class of a token.
    """
    sums: dict[BucketKind, dict[str, np.ndarray]] = {}
    totals_3 = np.zeros(3)
    for trace, trace_drafts in zip(traces, drafts, strict=True):
        counts_3KN = _counts(trace_drafts, policy, draft_length)
        totals_3 += counts_3KN.sum((1, 2))
        for kind, labels_KN in _labels(trace, trace_drafts, draft_length, tokenizer).items():
            by_label = sums.setdefault(kind, {})
            for label in np.unique(labels_KN):
                by_label[label] = by_label.get(label, np.zeros(3)) + counts_3KN[:, labels_KN == label].sum(1)
    order = _bucket_order(draft_length, [trace.prompt.domain for trace in traces])
    by = {
        kind: [
            _bucket(label, by_label[label], totals_3)
            for label in order[kind]
            if label in by_label and by_label[label][0] > 0
        ]
        for kind, by_label in sums.items()
    }
    return Breakdown(draft_length, DraftedTokens(*totals_3.tolist()), by)


def _counts(drafts: ReplayDrafts, policy: Policy, draft_length: int) -> np.ndarray:
    """Return the expected verified, accepted and lost tokens of every step and anchor, [3, K, N]."""
    chances = trace_chances(drafts, policy)
    visit_N = chances.visit_LN[draft_length - 1]
    begun_KN, reach_KN = chances.begun_KN[:draft_length], chances.reach_KN[:draft_length]
    inside_KN = inside_text(draft_length, len(visit_N))
    left_KN = inside_KN[::-1].cumsum(0)[::-1]  # tokens of a full draft from step k on
    return visit_N * np.stack([begun_KN, reach_KN, (begun_KN - reach_KN) * left_KN])


def _labels(
    trace: Trace, drafts: ReplayDrafts, draft_length: int, tokenizer: Tokenizer
) -> dict[BucketKind, np.ndarray]:
    """Return the bucket of every step and anchor, by kind, str [K, N]; arbitrary past the end of the text."""
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
    """Return names for the buckets between edges: [1, 4] -> below 1, 1 to 4, 4 and more."""
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


def classify(text: str, before: str) -> str:
    r"""Return the class of a token from its text and the text before it.

    ("def", "\n") -> word start, ("ine", "def") -> inside word, ("    ", "x:\n") -> indentation

    Args:
        text: of the token.
        before: text of a few tokens before it, or more.
    """
    if not text or "\ufffd" in text:
        return "part of a character"
    first = text.strip()[:1]
    if not first:
        opens_line = not before or ("\n" in before and not before.rpartition("\n")[2].strip())
        indents = text.rpartition("\n")[2] if "\n" in text else text * opens_line
        return "indentation" if indents else "whitespace"
    if first.isdigit():
        return "digits"
    if not (first.isalpha() or first == "_"):
        return "punctuation"
    continues_word = not text[0].isspace() and (before[-1:].isalnum() or before.endswith("_"))
    return "inside word" if continues_word else "word start"


def token_classes(tokenizer: Tokenizer, tokens: list[int], first: int) -> list[str]:
    """Return the class of every token of a text from position `first` on."""
    classes = []
    for position in range(first, len(tokens)):
        start = max(0, position - LOOK_BACK)
        before = tokenizer.decode(tokens[start:position], skip_special_tokens=False)
        after = tokenizer.decode(tokens[start : position + 1], skip_special_tokens=False)
        # A tokenizer may write a token differently at the start of a text, so the difference is taken.
        text = after[len(before) :] if after.startswith(before) else tokenizer.decode(tokens[position : position + 1])
        classes.append(classify(text, before))
    return classes


def calibrate(drafts: list[ReplayDrafts], policy: Policy, draft_length: int) -> Calibration:
    """Return the reliability of the confidence over verified steps, each weighted with its chance to be verified.

    Args:
        drafts: of the traces.
        policy: how drafts are verified and stopped.
        draft_length: K.
    """
    parts = [_steps(trace_drafts, policy, draft_length) for trace_drafts in drafts if len(trace_drafts.p_N)]
    confidence_X, acceptance_X, weight_X = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0))
    bin_X = np.minimum((confidence_X * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = []
    for number in range(NUM_BINS):
        inside_X = bin_X == number
        count = float(weight_X[inside_X].sum())
        if count > 0:
            confidence, acceptance = (
                float((weight_X * values_X)[inside_X].sum() / count) for values_X in (confidence_X, acceptance_X)
            )
            low, high = number / NUM_BINS, (number + 1) / NUM_BINS
            bins.append(CalibrationBin(low, high, count, confidence, acceptance))
    return _pooled(draft_length, bins)


def _steps(drafts: ReplayDrafts, policy: Policy, draft_length: int) -> np.ndarray:
    """Return the confidence, acceptance and weight of every step of a trace, [3, X]."""
    chances = trace_chances(drafts, policy)
    weight_KN = chances.visit_LN[draft_length - 1] * chances.begun_KN[:draft_length]
    accept_KN = acceptance_probability(drafts.p_N, drafts.q_KN[:draft_length], Verification.token)
    return np.stack([drafts.confidence_KN[:draft_length], accept_KN, weight_KN]).reshape(3, -1)


def _pooled(draft_length: int, bins: list[CalibrationBin]) -> Calibration:
    """Return the means over all bins, and the expected calibration error: a bin's mean distance from the diagonal."""
    total = sum(one.count for one in bins)
    if total == 0:
        return Calibration(draft_length, ece=None, confidence=None, acceptance=None, bins=bins)
    return Calibration(
        draft_length,
        ece=sum(one.count * abs(one.confidence - one.acceptance) for one in bins) / total,
        confidence=sum(one.count * one.confidence for one in bins) / total,
        acceptance=sum(one.count * one.acceptance for one in bins) / total,
        bins=bins,
    )


def sweep_thresholds(drafts: list[ReplayDrafts], policy: Policy, draft_length: int) -> list[Threshold]:
    """Return the acceptance at several confidence thresholds.

    Args:
        drafts: of all traces, made with `free_running`.
        policy: how drafts are made and verified; its threshold is replaced. Under `wrap_around` drafts are known at
            the anchors of its own passes only, so there is no other threshold than 0.
        draft_length: K.
    """
    limits = THRESHOLDS[:1] if policy.past_depth is PastDepth.wrap_around else THRESHOLDS
    return [_threshold(drafts, replace(policy, min_confidence=limit), draft_length) for limit in limits]


def _threshold(drafts: list[ReplayDrafts], policy: Policy, draft_length: int) -> Threshold:
    counts = replay_all(drafts, policy)[draft_length]
    passes, emitted = passes_and_tokens(counts)
    drafted = by_position(counts).drafted
    return Threshold(policy.min_confidence, emitted / passes, None if drafted is None else sum(drafted) / passes)
