"""The pass count test: an exact test of the number of passes of sampled loops, given the loops' own texts.

Given the text, the number of passes of a lossless loop has a known mean and variance (`markov.pass_moments`), and
prompts are independent. So z = sum(passes - mean) / sqrt(sum variance) is standard normal for many prompts, if loop and
replay are the same process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.certificate_result import PassCount, PassCountTest
from mtptrain.replay.drafts import ReplayDrafts
from mtptrain.replay.markov import pass_moments
from mtptrain.replay.replay import trace_chances

LEVEL = 1e-4  # of all tests together: evaluations run often, and a false alarm costs trust


@dataclass(frozen=True, slots=True)
class SampledRun:
    """Passes of one real loop, with the moments of their distribution given its text.

    Attributes:
        head: name of the head.
        draft_length: K.
        passes: number of passes of the loop.
        mean: expected number by replay on the loop's own text.
        variance: of the number, given that text.
    """

    head: str
    draft_length: int
    passes: int
    mean: float
    variance: float


def sampled_run(head: str, draft_length: int, passes: int, drafts: ReplayDrafts, policy: Policy) -> SampledRun:
    """Return a loop's number of passes with the moments that replay expects.

    Args:
        head: name of the head.
        draft_length: K.
        passes: number of passes of the loop.
        drafts: on the loop's own text, with its tokens' probabilities under the policy.
        policy: of the loop.
    """
    mean_L, variance_L = pass_moments(trace_chances(drafts, policy).reach_KN)
    return SampledRun(head, draft_length, passes, float(mean_L[draft_length - 1]), float(variance_L[draft_length - 1]))


def certify_pass_counts(runs: list[SampledRun]) -> PassCountTest:
    """Test every head and draft length; pass if no test rejects at a level of 1e-4 for all together."""
    groups: dict[tuple[str, int], list[SampledRun]] = {}
    for run in runs:
        groups.setdefault((run.head, run.draft_length), []).append(run)
    tests = [_test(*key, group) for key, group in groups.items()]
    passed = all(test.p_value >= LEVEL / len(tests) for test in tests)
    return PassCountTest(passed, LEVEL, tests)


def _test(head: str, draft_length: int, runs: list[SampledRun]) -> PassCount:
    passes, expected = sum(run.passes for run in runs), sum(run.mean for run in runs)
    error = math.sqrt(sum(run.variance for run in runs))
    # A smaller error is rounding of sums over a text, not chance: the number of passes is certain.
    if error < 1e-6 * max(1, passes):
        z, p_value = None, 1.0 if abs(passes - expected) < 1e-6 * max(1, passes) else 0.0
    else:
        z = (passes - expected) / error
        p_value = math.erfc(abs(z) / math.sqrt(2))
    return PassCount(
        head=head,
        draft_length=draft_length,
        runs=len(runs),
        passes=passes,
        expected=expected,
        standard_error=error,
        z=z,
        p_value=p_value,
    )
