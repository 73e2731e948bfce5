"""Types of plan.json, and the functions that write and read it. docs/plan.md describes every key."""

# K drafted tokens a pass

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mtptrain.config import HardwareConfig, PlanConfig, PlanKind
from mtptrain.errors import UserError
from mtptrain.planning.training_load import TrainingLoad
from mtptrain.run.provenance import Provenance
from mtptrain.run.storage import write_json
from mtptrain.run.typed_json import from_json, to_json

SCHEMA = 3


@dataclass(frozen=True, slots=True)
class Profile:
    """Conditional acceptance by position.

    Attributes:
        conditional: share of drafts kept at position k, given that all earlier ones were kept; later positions
            repeat the last.
        source: origin of the shares, for people to read.
    """

    conditional: list[float]
    source: str


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Numbers of parameters.

    Attributes:
        name: of the preset.
        parameters: of the backbone.
        active_parameters: of the backbone, used by one token.
        module_parameters: of one MTP module; embedding and lm_head belong to the backbone.
        module_parameters_without_routed_experts: the same without its routed experts.
        layers: number of layers by kind (`sliding`, `csa`, `hca`).
    """

    name: str
    parameters: int
    active_parameters: int
    module_parameters: int
    module_parameters_without_routed_experts: int
    layers: dict[str, int]


@dataclass(frozen=True, slots=True)
class PartCost:
    """Cost of one part of a pass.

    Attributes:
        bytes: memory traffic, as if one GPU ran the part alone.
        flops: as if one GPU ran the part alone.
        seconds: of all GPUs together.
        sent: bytes that each GPU sends to the others.
    """

    bytes: float
    flops: float
    seconds: float
    sent: float = 0.0


@dataclass(frozen=True, slots=True)
class PassCost:
    """Cost of one pass over a backbone or an MTP module.

    Attributes:
        tokens: new tokens of all rows.
        experts: expected number of routed experts that these tokens use in a layer.
        seconds, bytes, flops: sums over the parts.
        parts: by name, in the order in which they run.
    """

    tokens: int
    experts: float
    seconds: float
    bytes: float
    flops: float
    parts: dict[str, PartCost]


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Cost of drafting K tokens in every row.

    Attributes:
        seconds, bytes, flops: of the first step and K - 1 later ones.
        first_step: runs over the K + 1 slots of the last verify pass.
        later_step: runs over one slot.
    """

    seconds: float
    bytes: float
    flops: float
    first_step: PassCost
    later_step: PassCost


@dataclass(frozen=True, slots=True)
class DraftLengthRow:
    """Gain and cost of K drafts per pass.

    Attributes:
        draft_length: K; 0 is plain decoding.
        acceptance_length: tokens a pass.
        speedup: over plain decoding.
        tokens_per_second: of all rows together.
        break_even: see `speedup.Prediction`.
        verify: one backbone pass over K + 1 tokens of every row.
        draft: None for K = 0.
    """

    draft_length: int
    acceptance_length: float
    speedup: float
    tokens_per_second: float
    break_even: float | None
    verify: PassCost
    draft: DraftCost | None


@dataclass(frozen=True, slots=True)
class DecodingMemory:
    """Bytes that decoding holds in one GPU.

    Attributes:
        weights_bytes_a_gpu: the GPU's share of the backbone and of one MTP module.
        cache_bytes_a_gpu: cached keys of all rows.
        memory_bytes_a_gpu: memory of the GPU.
        fits: whether weights and keys fit.
    """

    weights_bytes_a_gpu: float
    cache_bytes_a_gpu: float
    memory_bytes_a_gpu: float
    fits: bool


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that training holds at its peak, by kind of tensor.

    Attributes:
        gpu: in one GPU, at the largest moment of a step.
        cpu: in CPU memory, per process.
        bytes_a_gpu: sum of `gpu`.
        memory_bytes_a_gpu: memory of the GPU.
        fits: whether the sum fits.
        moment: the largest moment of a step.
        moments: bytes in one GPU at each moment.
    """

    gpu: dict[str, float]
    cpu: dict[str, float]
    bytes_a_gpu: float
    memory_bytes_a_gpu: float
    fits: bool
    moment: str
    moments: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Time of one optimiser step; computing and communication do not overlap.

    Attributes:
        computing, communication: at the hardware's ceiling.
        expected_computing: at the share of the data sheet's rate that a published training reached.
    """

    computing: float
    communication: float
    expected_computing: float

    @property
    def total(self) -> float:
        """Seconds of the whole step at the ceiling."""
        return self.computing + self.communication

    @property
    def expected(self) -> float:
        """Seconds of the whole step to expect."""
        return self.expected_computing + self.communication


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of one optimiser step.

    Attributes:
        tokens: of all GPUs.
        flops: of all GPUs, by part.
        sent_bytes_a_gpu: bytes that each GPU sends, by content.
        seconds: see `StepSeconds`.
    """

    tokens: int
    flops: dict[str, float]
    sent_bytes_a_gpu: dict[str, float]
    seconds: StepSeconds


@dataclass(frozen=True, slots=True)
class StreamCacheSize:
    """Disk space of the cached streams in bf16, in bytes: per token and of the whole training."""

    bytes_a_token: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The part of plan.json that both kinds of plan share.

    Attributes:
        schema: version of the file's format.
        provenance: as in provenance.json.
        what: kind of plan.
        hardware, load: the `hardware` and `plan` sections of the settings.
        model: sizes of the model.
    """

    schema: int = SCHEMA
    provenance: Provenance
    what: PlanKind
    hardware: HardwareConfig
    load: PlanConfig
    model: ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingPlan(Plan):
    """plan.json for `plan.what=decoding`.

    Attributes:
        acceptance: assumed acceptance by position.
        keys_a_query: keys that a query attends to, by kind of layer.
        memory: of one GPU.
        draft_lengths: one row for each K from 0 to 8.
        best_draft_length: the K with the largest speed-up; 0 means that drafting does not pay.
    """

    what: PlanKind = PlanKind.decoding
    acceptance: Profile
    keys_a_query: dict[str, int]
    memory: DecodingMemory
    draft_lengths: list[DraftLengthRow]
    best_draft_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan(Plan):
    """plan.json for `plan.what=training`.

    Attributes:
        training: the training load.
        memory: of one process.
        step: cost of one optimiser step.
        tokens: of the whole training.
        tokens_per_second, hours: at the hardware's ceiling.
        expected_tokens_per_second, expected_hours: at the share of it that a published training reached.
        stream_cache: disk space of the training's streams.
    """

    what: PlanKind = PlanKind.training
    training: TrainingLoad
    memory: TrainingMemory
    step: StepCost
    tokens: int
    tokens_per_second: float
    hours: float
    expected_tokens_per_second: float
    expected_hours: float
    stream_cache: StreamCacheSize


def write_plan(path: Path, plan: DecodingPlan | TrainingPlan) -> None:
    """Write a plan as JSON, atomically."""
    write_json(path, to_json(plan))


def read_plan(path: Path) -> DecodingPlan | TrainingPlan:
    """Return the plan in a file that `write_plan` wrote.

    Raises:
        UserError: the file cannot be read, is not a plan, or has another schema.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        schema, what = (value.get("schema"), value.get("what")) if isinstance(value, dict) else (None, None)
        if schema != SCHEMA:
            raise UserError(f"{path}: has schema {schema}, this version reads schema {SCHEMA}; run +recipe=plan again")
        if PlanKind(what) is PlanKind.training:
            return from_json(TrainingPlan, value)
        return from_json(DecodingPlan, value)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a plan.json of +recipe=plan") from None
    except ValueError as error:  # not JSON, or a value of another type
        raise UserError(f"{path}: is not a plan.json ({error}); give one that +recipe=plan wrote") from None
