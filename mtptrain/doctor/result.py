"""The content of doctor.json as types: faults of a head's tensors, and its acceptance under every wiring."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.evaluation.certificate_result import AllAcceptControl, ShiftedTargetControl
from mtptrain.evaluation.head_result import Gain, Interval
from mtptrain.run.provenance import Provenance

DOCTOR_SCHEMA = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFaults:
    """Faults of a head's tensors: names, some with a description of the fault.

    Attributes:
        expected: number of tensors that the head should have.
        missing, unexpected, misshaped, non_finite, zero: errors.
        constant, same_as_stock, same_as_depth_before: may be intended.
        is_dspark: the tensors look like DSpark blocks.
        errors: number of names of the five kinds of errors.
    """

    expected: int
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]
    non_finite: list[str]
    zero: list[str]
    constant: list[str]
    same_as_stock: list[str]
    same_as_depth_before: list[str]
    is_dspark: bool
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WiringResult:
    """Acceptance of a head under one wiring.

    Attributes:
        wiring: its name.
        feeds: inputs of the module, in words.
        acceptance_length: at the longest draft length.
        interval: 95 % bootstrap interval.
        against_right: gain over the right wiring.
        against_best: gain over the wiring that fits the head best.
    """

    wiring: str
    feeds: str
    acceptance_length: float
    interval: Interval
    against_right: Gain
    against_best: Gain


@dataclass(frozen=True, slots=True)
class DoctorControls:
    """Negative controls of a diagnosis."""

    shifted_target: ShiftedTargetControl
    all_accept: AllAcceptControl


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict about a head.

    Attributes:
        healthy: no fault was found.
        best: the wiring that the head fits best; None if none was measured.
        alike: wirings that these prompts do not distinguish from the best.
        verdict: one sentence.
        findings: faults and their remedies.
    """

    healthy: bool
    best: str | None
    alike: list[str]
    verdict: str
    findings: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorResult:
    """The content of doctor.json; `wirings` and `controls` are None if the tensors do not make a head."""

    schema: int
    provenance: Provenance
    checkpoint: str
    draft_length: int
    diagnosis: Diagnosis
    tensors: TensorFaults
    wirings: list[WiringResult] | None
    controls: DoctorControls | None
