"""The certificate in evaluation.json as types: the conditions under which the figures of an evaluation count."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mtptrain.evaluation.sampler_result import SamplerTest


class Outcome(Enum):
    """The outcome of a check that may lack the texts that it needs."""

    passed = "passed"
    failed = "failed"
    not_tested = "not tested"


@dataclass(frozen=True, slots=True)
class TextDifference:
    """A loop whose text parts from plain greedy decoding.

    Attributes:
        head: name of the head.
        prompt: number of the prompt.
        draft_length: K.
        position: of the first different token.
        gap: between the backbone's two largest logits there; None if one text ends there and the other goes on.
    """

    head: str
    prompt: int
    draft_length: int
    position: int
    gap: float | None


@dataclass(frozen=True, slots=True)
class PassDifference:
    """A loop whose passes differ from those of the replay.

    Attributes:
        head: name of the head.
        prompt: number of the prompt.
        draft_length: K.
        loop_passes, replay_passes: their numbers.
        margin: how far the head's logits must move to make the passes equal; None if no move explains them.
    """

    head: str
    prompt: int
    draft_length: int
    loop_passes: int
    replay_passes: int
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class GreedyIdentity:
    """Texts of greedy loops against plain greedy decoding.

    Attributes:
        passed: there are no differences, and no more ties than the budget.
        compared: number of loops.
        identical: number of loops with the same text.
        tie_bound: largest gap of a numerical tie, from the noise of this run.
        tie_budget: most ties that the noise explains; the same position of a prompt counts once.
        near_ties: texts that part at a numerical tie of the two largest logits.
        differences: the other texts that part.
    """

    passed: bool
    compared: int
    identical: int
    tie_bound: float
    tie_budget: int
    near_ties: list[TextDifference]
    differences: list[TextDifference]


@dataclass(frozen=True, slots=True)
class ReplayEqualsLoop:
    """Passes of greedy loops against replay.

    Attributes:
        passed: there are no differences, and no more ties than the budget.
        compared: number of loops whose passes replay can know.
        equal: number of loops with the same passes.
        differences: the other loops, but for the near ties.
        near_ties: loops that part from replay at numerical ties of the head's logits only.
        ties: drafted tokens that were such a tie; one of a prompt counts once.
        tie_budget: most of them that the rounding of drafts explains.
        tie_bounds: by head, how far the logits of a tie lie apart at most.
    """

    passed: bool
    compared: int
    equal: int
    differences: list[PassDifference]
    near_ties: list[PassDifference] = field(default_factory=list)
    ties: int = 0
    tie_budget: int = 0
    tie_bounds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCount:
    """The passes of one head's sampled loops at one draft length, against replay.

    Attributes:
        head: name of the head.
        draft_length: K.
        runs: loops.
        passes: of the loops.
        expected: by replay on the loops' own texts.
        standard_error: of the passes, given these texts.
        z: difference in standard errors; None if nothing is random.
        p_value: two-sided; without z, 1 if the passes are the expected ones and 0 otherwise.
    """

    head: str
    draft_length: int
    runs: int
    passes: int
    expected: float
    standard_error: float
    z: float | None
    p_value: float


@dataclass(frozen=True, slots=True)
class PassCountTest:
    """Test of the number of passes of sampled loops; `level` holds for all tests together."""

    passed: bool
    level: float
    tests: list[PassCount]


@dataclass(frozen=True, slots=True)
class AllAcceptControl:
    """The loop with the backbone as its own draft.

    Attributes:
        acceptance_length: tokens a pass.
        ceiling: K + 1.
        passed: every draft was kept whole, but for numerical ties.
        near_ties: drafts that were rejected, if `passed` at numerical ties of the backbone's logits.
        tie_budget: most of them that rounding explains.
    """

    acceptance_length: float
    ceiling: int
    passed: bool
    near_ties: int = 0
    tie_budget: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedTargetControl:
    """Drafts of tokens that were replaced by those of another prompt's text.

    Attributes:
        outcome: failed if the drafts agree with the replaced tokens; not tested if the texts are too few or too alike.
        texts: texts that were compared.
        positions: of the replaced tokens in their continuations.
        drafted: drafted tokens that were compared.
        agreement: share of them that agree with the token of their own text; this and the next three are None if
            nothing was tested.
        shifted: share that agree with the token in its place.
        chance: the same, expected of random dealings of the texts.
        p_value: exact chance that a random dealing agrees as much.
        level: the largest p-value that fails.
    """

    outcome: Outcome
    texts: int
    positions: list[int]
    drafted: int
    agreement: float | None
    shifted: float | None
    chance: float | None
    p_value: float | None
    level: float


@dataclass(frozen=True, slots=True)
class Controls:
    """Negative controls; `shifted_target` by head, and none that failed if they `passed`."""

    passed: bool
    all_accept: AllAcceptControl
    shifted_target: dict[str, ShiftedTargetControl]


class Quantity(Enum):
    """A number that the logits give for each emitted token."""

    gap = "gap"  # difference of the two largest logits
    log_probability = "log-probability"  # of the emitted token, at temperature 1


@dataclass(frozen=True, slots=True)
class SizeLevel:
    """One measure of the differences along a text, over disturbed texts.

    Attributes:
        median: over the texts.
        bound: of a text without a fault.
        beyond: disturbed texts beyond the bound.
    """

    median: float
    bound: float
    beyond: int


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """Rounding noise of one quantity, over disturbed texts.

    Attributes:
        typical: the 75 % quantile of the differences along a text.
        largest: the largest difference along a text.
        extreme: the largest difference of all.
    """

    typical: SizeLevel
    largest: SizeLevel
    extreme: float


@dataclass(frozen=True, slots=True)
class RoundingNoise:
    """Rounding noise of a computation of logits; `texts` were disturbed."""

    texts: int
    gap: NoiseLevel
    log_probability: NoiseLevel


@dataclass(frozen=True, slots=True)
class SizeTest:
    """One measure of the differences along a text, over compared texts.

    Attributes:
        median: over the texts.
        bound: see `SizeLevel`.
        beyond: texts beyond the bound.
        budget: most texts beyond the bound that the noise explains.
        outcome: failed if more are; not tested if even all of them would not be enough.
    """

    median: float
    bound: float
    beyond: int
    budget: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitComparison:
    """One quantity from two computations on the same texts.

    Attributes:
        of, against: the two computations, in words.
        quantity: the compared quantity.
        texts: texts, one for each prompt.
        typical, largest: tests of the measures of `NoiseLevel`.
        outcome: failed if one of them did, not tested if neither was.
    """

    of: str
    against: str
    quantity: Quantity
    texts: int
    typical: SizeTest
    largest: SizeTest
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class LogitsTest:
    """Logits of decoding against transformers' forward and plain decoding, and of drafts against the rollout.

    Attributes:
        passed: no comparison failed.
        level: chance of a false alarm, of all comparisons together.
        backbone: rounding noise of the backbone's logits.
        drafts: rounding noise of each head's.
        comparisons: all of them.
    """

    passed: bool
    level: float
    backbone: RoundingNoise
    drafts: dict[str, RoundingNoise]
    comparisons: list[LogitComparison]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Conditions under which a figure counts.

    Attributes:
        passed: every part passed.
        logits: of decoding and drafting.
        greedy_identity: of all loops; if the run samples, of two prompts that are also decoded greedily.
        replay_equals_loop: of the same loops.
        pass_count_test: of loops with sampled drafts; None where drafts are greedy.
        sampler: exact test of drafting and verification.
        controls: negative controls.
    """

    passed: bool
    logits: LogitsTest
    greedy_identity: GreedyIdentity
    replay_equals_loop: ReplayEqualsLoop
    pass_count_test: PassCountTest | None
    sampler: SamplerTest
    controls: Controls
