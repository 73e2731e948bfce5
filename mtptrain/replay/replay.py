"""Replay: the verify passes of speculative decoding for every draft length, from one teacher-forced rollout.

Speculative decoding emits text distributed as the backbone's own, whatever the head drafts. So its passes can be read
off a text that the backbone emitted: exactly where drafts are greedy and the text is, else as expectations given the
text (`expected`). No decoding loop runs. docs/evaluation.md derives it.

Drafted tokens under a confidence threshold need more: past the first miss, where a draft stops depends on its own
tokens, not on the text. There the drafts of a second rollout are counted, which follows the head's own tokens. Whether
a pass begins at an anchor, and what is drafted there, are independent given the text up to that anchor, so

    E[drafts with a token k] = E[sum_n visit(n) [the draft at anchor n has a token k]],

visit(n) being a function of that text alone (it is a sum over earlier anchors of the chance to keep the tokens up to
n). With greedy drafts the second factor is certain, and the sum is what the loop counts. With sampled drafts it is one
draw, so the sum is unbiased. Where a stop token, not the limit, ends the text, drafts are cut where the text ends,
which depends on later tokens: for sampled drafts the last few anchors are then approximate.
"""


# K draft steps, N anchors of a trace

# K draft length

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtptrain.decoding.policy import Policy
from mtptrain.decoding.results import VerifyPass
from mtptrain.replay.drafts import ReplayDrafts
from mtptrain.replay.markov import ExpectedPasses, acceptance_probability, expected_passes, inside_text


def trace_chances(drafts: ReplayDrafts, policy: Policy) -> ExpectedPasses:
    """Where passes begin on a trace and how far their drafts are kept, for every draft length.

    Args:
        drafts: made under `policy`; its verification and its threshold may be others, from the same rollout.
        policy: how drafts are verified and stopped.
    """
    if len(drafts.p_N) == 0:
        return expected_passes(drafts.q_KN)
    accept_KN = acceptance_probability(drafts.p_N, drafts.q_KN, policy.verification)
    return expected_passes(accept_KN, drafts.confidence_KN >= policy.min_confidence)


def drafted_free(drafts: ReplayDrafts, policy: Policy) -> np.ndarray | None:
    """Whether the head's own draft at anchor n has a token k before the text ends, bool [K, N]; None if not known."""
    inside_KN = inside_text(*drafts.q_KN.shape)
    if policy.min_confidence == 0:
        return inside_KN
    if drafts.free_confidence_KN is None:
        return None
    return inside_KN & np.logical_and.accumulate(drafts.free_confidence_KN >= policy.min_confidence, axis=0)


def replay_counts(drafts: ReplayDrafts, policy: Policy) -> dict[int, Counts]:
    """Counts of one trace by draft length, 1 to K: expected ones, given the text; the loop's own where all is greedy.

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
    """`replay_counts` of every trace, in their order, by draft length."""
    by_trace = [replay_counts(one, policy) for one in drafts]
    return {length: [counts[length] for counts in by_trace] for length in by_trace[0]}


def replay_passes(drafts: ReplayDrafts, policy: Policy, draft_length: int) -> list[VerifyPass]:
    """The verify passes, one by one, that greedy speculative decoding makes on a greedy trace.

    Args:
        drafts: of the trace, at least `draft_length` steps, under a greedy policy.
        policy: greedy.
        draft_length: K.

    Raises:
        ValueError: the policy is not greedy, so that passes are chances; or how much is drafted is not known.
    """
    drafted_KN = drafted_free(drafts, policy)
    if not policy.is_greedy or drafted_KN is None:
        raise ValueError("passes can be listed for greedy decoding only, drafts along the head's own tokens known")
    reach_KN = trace_chances(drafts, policy).reach_KN[:draft_length]
    passes, anchor, num_tokens = [], 0, len(drafts.p_N)
    while anchor < num_tokens:
        accepted = int(reach_KN[:, anchor].sum())
        emitted = min(accepted + 1, num_tokens - anchor)
        passes.append(VerifyPass(int(drafted_KN[:draft_length, anchor].sum()), accepted, emitted))
        anchor += emitted
    return passes


@dataclass(frozen=True, slots=True)
class Counts:
    """Passes of one prompt at one draft length: whole numbers from a loop, expected ones from replay.

    Attributes:
        passes: verify passes; 0 where the prefill's token was the whole text.
        emitted: tokens that the passes emitted: all of the text but its first.
        drafted_K: float64, drafts that had a token at position k before the text ended; None where replay cannot
            tell (a confidence threshold on stacked modules, see `replay`).
        reached_K: float64, of these, drafts whose first k - 1 tokens were kept.
        accepted_K: float64, and whose token k was kept, too.
    """

    passes: float
    emitted: float
    drafted_K: np.ndarray | None
    reached_K: np.ndarray
    accepted_K: np.ndarray


def count_passes(passes: list[VerifyPass], draft_length: int) -> Counts:
    """Counts of passes that were really made.

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
