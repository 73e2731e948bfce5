"""The parts of a result that name what was measured: the prompts and the decoding policy."""

from __future__ import annotations

from mtptrain.config import DraftChoice
from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.result import PolicyResult, PromptsResult
from mtptrain.evaluation.trace_set import TraceSet


def describe_prompts(traces: TraceSet) -> PromptsResult:
    """Return the origin and the size of a trace set."""
    return PromptsResult(
        source=", ".join(source.name for source in traces.header.sources),
        sources=traces.header.sources,
        count=len(traces.traces),
        conversations=len({trace.prompt.group for trace in traces.traces}),
        dropped_turns=traces.header.dropped,
        prompt_tokens=max(len(trace.prompt.tokens) for trace in traces.traces),
        new_tokens=traces.header.max_new_tokens,
    )


def describe_policy(policy: Policy) -> PolicyResult:
    """Return a decoding policy as a result stores it; greedy decoding drafts greedily."""
    return PolicyResult(
        temperature=policy.temperature,
        top_k=policy.top_k,
        top_p=policy.top_p,
        draft=DraftChoice.greedy if policy.draws_greedily else policy.draft,
        verification=policy.verification,
        min_confidence=policy.min_confidence,
    )
