"""The content of evaluation.json as types: the figures of an evaluation, head by head.

Keys that are draft lengths or batch sizes are whole numbers here and text in the file.
"""

# K draft length

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mtptrain.config import DraftChoice, PastDepth, ServedAs, Verification
from mtptrain.evaluation.certificate_result import Certificate
from mtptrain.evaluation.head_result import Gain, HeadResult, Interval
from mtptrain.evaluation.notebook import describe, html_table
from mtptrain.evaluation.stored import ResultFile
from mtptrain.run.provenance import Provenance
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import to_json
from mtptrain.traces.prompts import Source

SCHEMA = 4  # of evaluation.json
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    quartiles: Interval


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of the wall time of speculative decoding by phase; the rest is bookkeeping."""

    prefill: float
    draft: float
    verify: float
    sample: float
    rewind: float


class Doubt(Enum):
    """A reason why a measured speed-up cannot be right."""

    above_acceptance_length = "above the acceptance length"  # a verify pass costs at least a plain step
    ratio_of_heads = "ratio of heads"  # of equal cost, but their speeds differ otherwise than their acceptance
    busy = "busy machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup(Spread):
    """Tokens a second over those of plain decoding.

    Attributes:
        interval: of the median, without an assumption about the distribution.
        confidence: of this interval; below 0.95 with fewer than six batches.
        per_batch: the ratio of every timed batch.
        after_prefill: the ratio without the prefill.
        processor: the ratio of tokens a second of processor time; None if the work was a GPU's.
        shares: of the wall time.
        doubts: reasons why the ratio cannot be right.
    """

    interval: Interval
    confidence: float
    per_batch: list[float]
    after_prefill: Spread
    processor: Spread | None
    shares: TimeShares
    doubts: list[Doubt]


@dataclass(frozen=True, slots=True)
class MachineLoad:
    """How much of the machine the timed runs had.

    Attributes:
        processor_share: processor time of this process over the wall time; None if the work was a GPU's.
        load: highest load average of a minute; None if unknown.
        cores: of the machine.
    """

    processor_share: float | None
    load: float | None
    cores: int


@dataclass(frozen=True, slots=True)
class StepLatency:
    """Seconds of single steps and the speed-ups that they predict.

    Attributes:
        batch: rows decoded together.
        context: tokens that each row held.
        repetitions: of every step.
        step_seconds: of a verify pass, by its tokens.
        draft_seconds: of drafting K tokens, by K.
        predicted_speedup: by K.
    """

    batch: int
    context: int
    repetitions: int
    step_seconds: dict[int, Spread]
    draft_seconds: dict[int, Spread]
    predicted_speedup: dict[int, Spread]


@dataclass(frozen=True, slots=True)
class BackboneResult:
    """The frozen backbone and its loss on held-out text."""

    name: str
    fingerprint: str
    parameters: int
    heldout_nats_per_token: float
    heldout_bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsResult:
    """The prompts of an evaluation.

    Attributes:
        source: names of the sources.
        sources: origins of the prompts.
        count: prompts.
        conversations: independent groups of prompts: the turns of a conversation, copies of a prompt and the slices of
            one document are one group.
        dropped_turns: turns left out because their conversation had outgrown the context.
        prompt_tokens: of the longest prompt.
        new_tokens: most tokens of a continuation.
    """

    source: str
    sources: list[Source]
    count: int
    conversations: int
    dropped_turns: int
    prompt_tokens: int
    new_tokens: int

    @property
    def count_text(self) -> str:
        """The number of prompts and, if they are not independent, of the groups that intervals resample."""
        is_single = self.conversations == self.count
        return f"{self.count} prompts" if is_single else f"{self.conversations} groups of {self.count} prompts"

    @property
    def interval_text(self) -> str:
        """The source of intervals: the prompts, or groups if prompts are not independent of each other."""
        if self.conversations == 1:
            return "from one independent group of prompts, whose interval is all that is possible"
        return f"95 % bootstrap interval over {self.count_text}"


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """How tokens were drawn, drafted and verified, see `decoding.policy.Policy`; and the numerics of the heads."""

    temperature: float
    top_k: int | None
    top_p: float
    draft: DraftChoice
    verification: Verification
    min_confidence: float
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    past_depth: PastDepth = PastDepth.repeat_last
    served_as: ServedAs = ServedAs.exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The content of evaluation.json.

    Attributes:
        schema: `SCHEMA`.
        provenance: of the run.
        backbone, prompts, policy: of the measurement.
        draft_length: the longest K.
        heads: one or both of the stock and the trained head, in this order.
        gain: trained minus stock by K; None with one head, an entry is None without verify passes.
        gain_by_domain: the same by domain at the longest K; an entry is None for a domain without verify passes.
        certificate: conditions under which a figure counts.
        speedup: by batch size, head and K.
        machine: while these were timed, by batch size.
        steps: by batch size and head.
        plain_tokens_per_second: of plain decoding, by batch size.
    """

    schema: int
    provenance: Provenance
    backbone: BackboneResult
    prompts: PromptsResult
    policy: PolicyResult
    draft_length: int
    heads: list[HeadResult]
    gain: dict[int, Gain | None] | None
    gain_by_domain: dict[str, Gain | None] | None
    certificate: Certificate
    speedup: dict[int, dict[str, dict[int, Speedup]]]
    machine: dict[int, MachineLoad]
    steps: dict[int, dict[str, StepLatency]]
    plain_tokens_per_second: dict[int, float]

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        """Return the acceptance lengths as a table, for a notebook."""
        return html_table(self)

    @property
    def draft_lengths(self) -> range:
        """The measured K, from 1 to the longest."""
        return range(1, self.draft_length + 1)

    @property
    def first_batch(self) -> int:
        """The smallest batch that was timed."""
        return min(self.speedup)

    @property
    def shown_batches(self) -> list[int]:
        """The smallest and the largest batch that were timed; one if they are the same."""
        return sorted({min(self.speedup), max(self.speedup)})

    @property
    def last_head(self) -> HeadResult:
        """The head of the headline: the trained one if it was measured."""
        return self.heads[-1]

    @property
    def longest_gain(self) -> Gain | None:
        """Gain of the trained head at the longest K; None with one head."""
        return self.gain[self.draft_length] if self.gain else None


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation.json, atomically."""
    write_json(path, to_json(evaluation))


_FILE = ResultFile(
    content=Evaluation,
    name=EVALUATION_FILE,
    schema=SCHEMA,
    wanted=f"an {EVALUATION_FILE} or its run's folder",
    again="give one that `+recipe=evaluate` of this version wrote",
)


def read_evaluation(path: Path, setting: str) -> Evaluation:
    """Return the evaluation of a file or a run's folder; see `ResultFile.read`."""
    return _FILE.read(path, setting)
