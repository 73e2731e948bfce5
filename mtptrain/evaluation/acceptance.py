"""All that replay tells about one head on one set of traces, as the head's entry in evaluation.json holds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.breakdown import break_down
from mtptrain.evaluation.calibration import calibrate
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.drafts import TraceDrafts
from mtptrain.evaluation.metrics import by_domain, by_position, summarize, totals
from mtptrain.evaluation.replay import replay_all
from mtptrain.evaluation.trace import Trace

THRESHOLDS = (0.2, 0.4, 0.6, 0.8)


def describe_acceptance(
    traces: list[Trace], drafts: list[TraceDrafts], counts: Replayed, policy: Policy, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Acceptance by draft length, domain, kind of token and confidence.

    Args:
        traces: the texts.
        drafts: of the traces, in their order, following the head's own drafts too.
        counts: of the drafts replayed under the policy.
        policy: how drafts are made, verified and stopped.
        tokenizer: the backbone's.

    Returns:
        `replay` and `per_prompt` by K; `domains`, `breakdown`, `calibration` and `thresholds` at the longest K.
    """
    longest = max(counts)
    groups, domains = [trace.prompt.group for trace in traces], [trace.prompt.domain for trace in traces]
    return {
        "replay": {str(k): summarize(counts[k], groups) for k in counts},
        "per_prompt": {str(k): [totals([one]) for one in counts[k]] for k in counts},
        "domains": by_domain(counts[longest], groups, domains),
        "breakdown": break_down(traces, drafts, policy, longest, tokenizer),
        "calibration": calibrate(drafts, policy, longest),
        "thresholds": [
            _threshold(drafts, replace(policy, min_confidence=below), longest) for below in (0.0, *THRESHOLDS)
        ],
    }


def _threshold(drafts: list[TraceDrafts], policy: Policy, draft_length: int) -> dict[str, Any]:
    """Acceptance length and drafted tokens a pass where drafts end at a confidence."""
    counts = replay_all(drafts, policy)[draft_length]
    found = totals(counts)
    drafted = by_position(counts)["drafted"]
    known = None not in drafted
    return {
        "stop_below": policy.min_confidence,
        "acceptance_length": found["acceptance_length"],
        "drafted_per_pass": sum(drafted) / found["passes"] if known else None,
    }
