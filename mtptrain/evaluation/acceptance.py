"""Acceptance of one head where a confidence threshold ends its drafts, by replay."""

from __future__ import annotations

from dataclasses import replace

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.drafts import TraceDrafts
from mtptrain.evaluation.head_result import Threshold
from mtptrain.evaluation.metrics import by_position, passes_and_tokens
from mtptrain.evaluation.replay import replay_all

THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8)


def sweep_thresholds(drafts: list[TraceDrafts], policy: Policy, draft_length: int) -> list[Threshold]:
    """Return the acceptance at several confidence thresholds.

    Args:
        drafts: of all traces, following the head's own drafts too.
        policy: how drafts are made and verified; its threshold is replaced.
        draft_length: K.
    """
    return [_threshold(drafts, replace(policy, min_confidence=below), draft_length) for below in THRESHOLDS]


def _threshold(drafts: list[TraceDrafts], policy: Policy, draft_length: int) -> Threshold:
    counts = replay_all(drafts, policy)[draft_length]
    passes, emitted = passes_and_tokens(counts)
    drafted = by_position(counts).drafted
    return Threshold(policy.min_confidence, emitted / passes, None if drafted is None else sum(drafted) / passes)
