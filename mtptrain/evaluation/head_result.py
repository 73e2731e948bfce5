"""The figures of one head as types: a head's entry in evaluation.json."""

# K draft length, k position in the draft from 1

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

Interval = tuple[float, float]


def span(interval: Interval, signed: bool = False) -> str:
    """Return `low to high` with two decimals."""
    low, high = interval
    return f"{low:+.2f} to {high:+.2f}" if signed else f"{low:.2f} to {high:.2f}"


@dataclass(frozen=True, slots=True)
class Gain:
    """A paired difference between two heads on the same prompts.

    Attributes:
        gain: the difference.
        interval: 95 % interval over groups of prompts; of one group, everything possible.
        detectable: smallest true difference that these prompts would have shown with 80 % power.
    """

    gain: float
    interval: Interval
    detectable: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies above 0."""
        return self.interval[0] > 0

    @property
    def is_clear_loss(self) -> bool:
        """Whether the interval lies below 0."""
        return self.interval[1] < 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Verify passes and emitted tokens of some prompts: whole numbers of a loop, expected ones of a replay.

    Attributes:
        acceptance_length: emitted tokens a pass; None without passes.
        passes: verify passes.
        emitted: tokens that the passes emitted.
    """

    acceptance_length: float | None
    passes: float
    emitted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Acceptance of one head at one draft length; the lists have an entry for every position.

    Attributes:
        acceptance_length: emitted tokens a pass; this and the interval are None without passes.
        passes: verify passes.
        emitted: tokens that the passes emitted.
        interval: 95 % interval of the acceptance length over groups of prompts; of one group, everything possible.
        drafted: drafts that had a token at position k before the text ended; None if unknown.
        reached: drafts whose first k - 1 tokens were kept, so that position k was verified.
        accepted: drafts whose token k was kept, too.
        conditional: accepted / reached; None if position k was never reached.
        unconditional: accepted / drafted; None if unknown.
    """

    acceptance_length: float | None
    passes: float
    emitted: float
    interval: Interval | None
    drafted: list[float | None]
    reached: list[float]
    accepted: list[float]
    conditional: list[float | None]
    unconditional: list[float | None]


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """Figures on held-out text by draft step, up to the last one that runs as in training.

    Attributes:
        alpha: overlap of the head's and the backbone's distributions, sum_v min(p, q); None where there are no tokens,
            as in documents too short for the step.
        top1: share of tokens with the same first choice of both; None likewise.
        tokens: tokens behind these means.
    """

    alpha: list[float | None]
    top1: list[float | None]
    tokens: list[int]

    def padded(self, length: int) -> tuple[list[float | None], list[float | None], list[float | None]]:
        """Return alpha, top1 and tokens of the first `length` steps; None past the known ones."""
        missing: list[float | None] = [None] * (length - len(self.alpha))
        return [*self.alpha, *missing], [*self.top1, *missing], [*self.tokens, *missing]


@dataclass(frozen=True, slots=True)
class SeenPrompts:
    """Prompts that a head saw in training.

    Attributes:
        prompts: all prompts.
        checked: prompts with a passage that could be looked up in the sample of the training text.
        seen: prompts at least half of whose passages were found there.
    """

    prompts: int
    checked: int
    seen: int


@dataclass(frozen=True, slots=True)
class ChosenOn:
    """The prompts that chose a checkpoint as the best of its run.

    Attributes:
        prompts: all prompts of this measurement.
        shared: those of them on which the checkpoint was chosen.
        by: name of the metric that chose it.
    """

    prompts: int
    shared: int
    by: str


def chosen_text(head: str, chosen: ChosenOn | None) -> str | None:
    """Return how many of the prompts chose a checkpoint as the best of its run, as one sentence; None if none did."""
    if chosen is None or not chosen.shared:
        return None
    return (
        f"{head} was chosen as the best of its run on {chosen.shared} of these {chosen.prompts} prompts, so its figure "
        "is too high by chance; measure it on others"
    )


class BucketKind(Enum):
    """A way of sorting drafted tokens into buckets."""

    position = "position"
    domain = "domain"
    context = "context"
    generated = "generated"
    token_class = "token_class"
    entropy = "entropy"


@dataclass(frozen=True, slots=True)
class DraftedTokens:
    """Expected numbers of drafted tokens.

    Attributes:
        reached: verified.
        accepted: kept.
        lost: cost by misses, the missed token and the rest of its draft.
    """

    reached: float
    accepted: float
    lost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The drafted tokens of one bucket.

    Attributes:
        bucket: its name.
        reached, accepted, lost: see `DraftedTokens`.
        acceptance: accepted / reached.
        lost_share: share of all lost tokens.
    """

    bucket: str
    reached: float
    accepted: float
    lost: float
    acceptance: float
    lost_share: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Drafted tokens by kind at one draft length; `by` lists the buckets that were reached."""

    draft_length: int
    totals: DraftedTokens
    by: dict[BucketKind, list[Bucket]]


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Steps whose confidence lies between `low` and `high`: their expected number and their means."""

    low: float
    high: float
    count: float
    confidence: float
    acceptance: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence of a head against the acceptance of the same steps.

    Attributes:
        draft_length: K.
        ece: expected calibration error; this and the means are None if nothing was verified.
        confidence, acceptance: means.
        bins: the bins that are not empty.
    """

    draft_length: int
    ece: float | None
    confidence: float | None
    acceptance: float | None
    bins: list[CalibrationBin]


@dataclass(frozen=True, slots=True)
class Threshold:
    """Replay with drafts that end below a confidence; `drafted_per_pass` is None if unknown."""

    min_confidence: float
    acceptance_length: float
    drafted_per_pass: float | None


class PieceKind(Enum):
    """Origin of a piece of text: a kept draft, the verifier's own token, or a rejected draft (no part of the text)."""

    accepted = "accepted"
    bonus = "bonus"
    rejected = "rejected"


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a sample, as text."""

    text: str
    kind: PieceKind


@dataclass(frozen=True, slots=True)
class Sample:
    """The end of a prompt and its continuation by the loop."""

    prompt: str
    draft_length: int
    pieces: list[Piece]


POSITION_METRICS = {  # the table by position has a column for each, on the page and in trackers
    "accepted": "share of drafts kept at this position once all before it were",
    "alpha": "overlap with the backbone's distribution on held-out text",
    "top-1": "same first choice as the backbone's on held-out text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadResult:
    """The figures of one head.

    Attributes:
        name: `stock` or `trained`.
        checkpoint: its folder, or `stock`.
        mode: `shared` or `stacked`.
        depth: modules.
        parameters: of all modules.
        teacher_forced: on held-out text.
        replay: by draft length.
        other_drafts: `replay` with greedy instead of sampled drafts, or the reverse; None at temperature 0.
        per_prompt: by draft length, an entry for every prompt in their order.
        domains: by domain, at the longest draft length; None for a domain without verify passes.
        breakdown, calibration, thresholds: at the longest draft length.
        loop: of the prompts that the loop decoded, by draft length, smallest batch.
        samples: some of the decoded texts.
        seen_prompts: prompts that the head saw in training; None if its training text is unknown.
        chosen_on: prompts that chose the head as the best of its run; None if it was not chosen or this is unknown.
    """

    name: str
    checkpoint: str
    mode: str
    depth: int
    parameters: int
    teacher_forced: TeacherForced
    replay: dict[int, Acceptance]
    per_prompt: dict[int, list[Totals]]
    domains: dict[str, Acceptance | None]
    breakdown: Breakdown
    calibration: Calibration
    thresholds: list[Threshold]
    loop: dict[int, Totals]
    samples: list[Sample]
    seen_prompts: SeenPrompts | None = None
    other_drafts: dict[int, Acceptance] | None = None
    chosen_on: ChosenOn | None = None

    def __repr__(self) -> str:
        """Return name and acceptance length at the longest K, in place of every figure of every prompt."""
        longest = max(self.replay)
        length = self.replay[longest].acceptance_length
        figure = "no verify pass" if length is None else f"{length:.2f} tokens a pass"
        return f"<HeadResult {self.name}: {figure} at K={longest}>"

    def by_position(self, length: int) -> dict[str, Sequence[float | None]]:
        """Return the metrics of `POSITION_METRICS`, each with a value for every position of a draft of `length`."""
        alpha, top1, _ = self.teacher_forced.padded(length)
        return {"accepted": self.replay[length].conditional, "alpha": alpha, "top-1": top1}
