"""Replay against the loop where tokens are sampled: an exact test of the number of passes, given the loop's own text.

Given the text, the number of passes of a lossless loop has a known mean and variance (`expected.pass_moments`), prompts
being independent. So z = sum(passes - mean) / sqrt(sum variance) is standard normal for many prompts, if loop and
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

LEVEL = 1e-4  # of all tests together: an evaluation is run often, and a false alarm costs trust


@dataclass(frozen=True, slots=True)
class SampledRun:
    """Passes of one loop that was really run, beside their law given its text.

    Attributes:
        head: name of the head.
        draft_length: K.
        passes: what the loop made.
        mean: what replay expects on the loop's own text.
        variance: of the passes, given that text.
    """

    head: str
    draft_length: int
    passes: int
    mean: float
    variance: float


def sampled_run(head: str, draft_length: int, passes: int, drafts: ReplayDrafts, policy: Policy) -> SampledRun:
    """A loop's passes beside their law.

    Args:
        head: name of the head.
        draft_length: K.
        passes: what the loop made.
        drafts: of the loop's own text, which carries the probabilities that the policy gave its tokens.
        policy: of the loop.
    """
    mean_L, variance_L = pass_moments(trace_chances(drafts, policy).reach_KN)
    return SampledRun(head, draft_length, passes, float(mean_L[draft_length - 1]), float(variance_L[draft_length - 1]))


def certify_law(runs: list[SampledRun]) -> PassCountTest:
    """Test every head and draft length; passes when none is off at a level of 1e-4 for all together."""
    groups: dict[tuple[str, int], list[SampledRun]] = {}
    for run in runs:
        groups.setdefault((run.head, run.draft_length), []).append(run)
    tests = [_test(*key, group) for key, group in groups.items()]
    passed = all(test.p_value >= LEVEL / len(tests) for test in tests)
    return PassCountTest(passed, LEVEL, tests)


def _test(head: str, draft_length: int, runs: list[SampledRun]) -> PassCount:
    passes, expected = sum(run.passes for run in runs), sum(run.mean for run in runs)
    error = math.sqrt(sum(run.variance for run in runs))
    # Rounding of sums over a text, not chance: below it the number of passes is certain.
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
