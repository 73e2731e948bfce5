"""Replay: the verify passes of speculative decoding for every draft length, from one teacher-forced rollout.

Speculative decoding emits text that is distributed as the backbone's own, whatever the head drafts. So its passes can
be derived from a text that the backbone emitted: exactly if text and drafts are greedy, else as expectations given the
text (`markov`). No decoding loop runs. docs/evaluation.md gives the derivation. Passes of a real loop are counted in
the same form (`count_passes`), so the two can be compared.

Drafted tokens under a confidence threshold need more: past the first rejected token, the end of a draft depends on its
own tokens, not on the text. They are counted in the drafts of a second rollout, which follows the head's own tokens.
Whether a pass begins at an anchor, and the draft there, are independent given the text up to that anchor, so

    E[drafts with a token k] = E[sum_n visit(n) [the draft at anchor n has a token k]],

visit(n) being a function of that text alone (a sum over earlier anchors of the chance to keep the tokens up to n). With
greedy drafts the second factor is certain, and the sum is the count of the loop. With sampled drafts it is one draw, so
the sum is unbiased. If a stop token, not the limit, ends the text, drafts are cut at the end of the text, which depends
on later tokens: for sampled drafts the last few anchors are then approximate.
"""

# K draft steps or draft length, L draft lengths 1..K, N anchors of a trace, P passes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import VerifyPass
from mtptrain.mtp.stack import MtpStack
from mtptrain.replay.drafts import ReplayDrafts, draft_traces
from mtptrain.replay.markov import ExpectedPasses, acceptance_probability, expected_passes, inside_text
from mtptrain.traces.file import Trace


@dataclass(frozen=True, slots=True)
class Counts:
    """Passes of one prompt at one draft length: whole numbers from a loop, expected ones from replay.

    Attributes:
        passes: verify passes; 0 if the prefill's token was the whole text.
        emitted: tokens that the passes emitted: all of the text but its first.
        drafted_K: float64, drafts that had a token at position k before the text ended; None if replay cannot know it
            (a confidence threshold on stacked modules, see the module docstring).
        reached_K: float64, drafts whose first k - 1 tokens were kept and whose step k was drafted.
        accepted_K: float64, drafts whose first k tokens were kept.
    """

    passes: float
    emitted: float
    drafted_K: np.ndarray | None
    reached_K: np.ndarray
    accepted_K: np.ndarray


def trace_chances(drafts: ReplayDrafts, policy: Policy) -> ExpectedPasses:
    """Return the chances of passes on a trace and of their drafts to be kept, for every draft length.

    Args:
        drafts: of the trace, made under `policy`; only verification and threshold may differ, one rollout serves all.
        policy: how drafts are verified and stopped.
    """
    if len(drafts.p_N) == 0:
        return expected_passes(drafts.q_KN)
    accept_KN = acceptance_probability(drafts.p_N, drafts.q_KN, policy.verification)
    return expected_passes(accept_KN, (drafts.confidence_KN >= policy.min_confidence) & drafted_depth(drafts))


def drafted_depth(drafts: ReplayDrafts) -> np.ndarray:
    """Return whether the head drafts step k at all, bool [K, 1]."""
    steps = len(drafts.q_KN)
    limit = steps if drafts.drafted_steps is None else drafts.drafted_steps
    return (np.arange(1, steps + 1) <= limit)[:, None]


def drafted_free(drafts: ReplayDrafts, policy: Policy) -> np.ndarray | None:
    """Return whether the head's own draft at anchor n has a token k inside the text, bool [K, N]; None if unknown."""
    inside_KN = inside_text(*drafts.q_KN.shape) & drafted_depth(drafts)
    if policy.min_confidence == 0:
        return inside_KN
    if drafts.free_confidence_KN is None:
        return None
    return inside_KN & np.logical_and.accumulate(drafts.free_confidence_KN >= policy.min_confidence, axis=0)


def replay_counts(drafts: ReplayDrafts, policy: Policy) -> dict[int, Counts]:
    """Return the counts of one trace by draft length, 1 to K.

    They are expectations given the text; if text and drafts are greedy, they are the counts of the loop.

    Args:
        drafts: of the trace.
        policy: as for `trace_chances`.
    """
    chances = trace_chances(drafts, policy)
    free_KN = drafted_free(drafts, policy)
    drafted_LK = None if free_KN is None else chances.at_positions(free_KN.astype(np.float64))
    passes_L, reached_LK, accepted_LK = chances.passes_L, chances.reached_LK, chances.accepted_LK
    return {
        row + 1: Counts(
            passes=float(passes_L[row]),
            emitted=float(len(drafts.p_N)),
            drafted_K=None if drafted_LK is None else drafted_LK[row, : row + 1],
            reached_K=reached_LK[row, : row + 1],
            accepted_K=accepted_LK[row, : row + 1],
        )
        for row in range(len(drafts.q_KN))
    }


def replay_all(drafts: list[ReplayDrafts], policy: Policy) -> dict[int, list[Counts]]:
    """Return the counts of every trace, in their order, by draft length."""
    by_trace = [replay_counts(trace_drafts, policy) for trace_drafts in drafts]
    return {length: [counts[length] for counts in by_trace] for length in by_trace[0]}


def replay_lengths(
    model: DeepseekV4ForCausalLM,
    stack: MtpStack,
    traces: list[Trace],
    longest: int,
    policy: Policy,
    free_running: bool = False,
) -> tuple[list[ReplayDrafts], dict[int, list[Counts]]]:
    """Return the drafts at the longest K and the counts of every trace by draft length; arguments of `draft_traces`.

    One rollout serves every K, unless drafts depend on the passes before them, and so on K.
    """
    drafts = draft_traces(model, stack, traces, longest, policy, free_running=free_running)
    counts = replay_all(drafts, policy)
    if policy.wraps(stack.depth, longest):
        for k in range(1, longest):
            counts[k] = replay_all(draft_traces(model, stack, traces, k, policy), policy)[k]
    return drafts, counts


def replay_other_drafts(drafts: list[ReplayDrafts], policy: Policy) -> dict[int, list[Counts]] | None:
    """Return `replay_all` with greedy instead of sampled drafts, or the reverse; None where no rollout gives both."""
    other = [one for trace_drafts in drafts if (one := trace_drafts.with_other_drafts) is not None]
    other_policy = policy.with_other_drafts
    return replay_all(other, other_policy) if other_policy is not None and len(other) == len(drafts) else None


def replay_passes(drafts: ReplayDrafts, policy: Policy, draft_length: int) -> list[VerifyPass]:
    """Return the verify passes of speculative decoding with greedy drafts on a trace, one by one.

    Args:
        drafts: of the trace, at least `draft_length` steps, under the policy.
        policy: with greedy drafts.
        draft_length: K.

    Raises:
        ValueError: drafts are sampled, so that passes are random; or the number of drafted tokens is unknown.
    """
    return listed_passes(anchor_passes(drafts, policy, draft_length))


def listed_passes(at_anchors: list[VerifyPass]) -> list[VerifyPass]:
    """Return the passes that follow one another from the first anchor on, given the pass at every anchor."""
    passes, anchor = [], 0
    while anchor < len(at_anchors):
        passes.append(at_anchors[anchor])
        anchor += passes[-1].emitted
    return passes


def anchor_passes(drafts: ReplayDrafts, policy: Policy, draft_length: int) -> list[VerifyPass]:
    """Return the verify pass that begins at each anchor of a text, if one does; drafts are greedy.

    Sampled texts with greedy drafts have certain passes, too: a draft is kept if and only if the text has its token.

    Args, Raises: see `replay_passes`.
    """
    drafted_KN = drafted_free(drafts, policy)
    if not policy.draws_greedily or drafted_KN is None:
        raise ValueError("passes can be listed for greedy drafts only, with the head's own drafts known")
    reach_KN = trace_chances(drafts, policy).reach_KN[:draft_length]
    num_tokens = len(drafts.p_N)
    counts = zip(drafted_KN[:draft_length].sum(0).tolist(), reach_KN.sum(0).round().astype(int).tolist(), strict=True)
    return [
        VerifyPass(drafted, accepted, min(accepted + 1, num_tokens - anchor))
        for anchor, (drafted, accepted) in enumerate(counts)
    ]


def count_passes(passes: list[VerifyPass], draft_length: int) -> Counts:
    """Return the counts of the passes of a real loop.

    Args:
        passes: of one prompt.
        draft_length: K.
    """
    drafted_P1 = np.array([record.drafted for record in passes], dtype=np.int64).reshape(-1, 1)
    accepted_P1 = np.array([record.accepted for record in passes], dtype=np.int64).reshape(-1, 1)
    position_K = np.arange(1, draft_length + 1)
    has_PK = drafted_P1 >= position_K
    return Counts(
        passes=float(len(passes)),
        emitted=float(sum(record.emitted for record in passes)),
        drafted_K=has_PK.sum(0).astype(np.float64),
        reached_K=(has_PK & (accepted_P1 >= position_K - 1)).sum(0).astype(np.float64),
        accepted_K=(accepted_P1 >= position_K).sum(0).astype(np.float64),
    )
