"""The number of drafts that an exported head is served with."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config import ExportTarget, HardwareConfig, PlanConfig, ShapeConfig
from mtptrain.evaluation.compare import gain_sentence
from mtptrain.evaluation.result import Evaluation
from mtptrain.planning.decoding import draft_length_rows
from mtptrain.planning.result import Profile


@dataclass(frozen=True, slots=True)
class PlannedLength:
    """The fastest K of a plan, 0 if drafting does not pay, and the plan's hardware."""

    draft_length: int
    hardware: str


@dataclass(frozen=True, slots=True)
class DraftLength:
    """The recommended K, and where it comes from.

    Attributes:
        served: K of the command.
        reason: for people to read.
        measured: fastest K of the run's own evaluation, at its smallest batch; None if it has none or they are doubted.
        planned: fastest K of the plan; None without a plan for this model.
    """

    served: int
    reason: str
    measured: int | None
    planned: PlannedLength | None


def fastest_measured(evaluation: Evaluation | None) -> int | None:
    """Return the K at which an evaluation timed the trained head as fastest; None without one or if it is doubted."""
    if evaluation is None or _is_doubted(evaluation):
        return None
    speedups = evaluation.speedup[evaluation.first_batch].get("trained")
    return max(speedups, key=lambda k: speedups[k].median) if speedups else None


def _is_doubted(evaluation: Evaluation) -> bool:
    """Return whether a speed-up at the smallest batch cannot be right, as on a busy machine."""
    by_head = evaluation.speedup[evaluation.first_batch]
    return any(speed.doubts for by_length in by_head.values() for speed in by_length.values())


def fastest_planned(
    shape: ShapeConfig, hardware: HardwareConfig, plan: PlanConfig, conditional: list[float | None]
) -> PlannedLength:
    """Return the K at which a plan is fastest, among those whose acceptance was measured; 0 is plain decoding.

    Args:
        shape: sizes of the model.
        hardware: that serves it.
        plan: load of the server.
        conditional: share kept at each position of the longest measured draft; None if never reached.
    """
    profile = Profile([share or 0.0 for share in conditional], "the export's prompts")
    rows = draft_length_rows(shape, hardware, plan, profile)
    known = [row for row in rows if row.draft_length <= len(conditional)]
    best = max(known, key=lambda row: row.speedup).draft_length
    return PlannedLength(best, f"{hardware.num_gpus} x {hardware.name}")


def choose_draft_length(
    target: ExportTarget, depth: int, steps: int, measured: int | None, planned: PlannedLength | None
) -> DraftLength:
    """Return the K to serve a head with.

    Args:
        target: the server.
        depth: number of modules; a server runs a stacked head as trained only at K = depth.
        steps: draft steps of the training.
        measured: see `DraftLength`.
        planned: see `DraftLength`.
    """
    if depth > 1 and target is not ExportTarget.hf:
        return DraftLength(depth, "the number of modules", measured, planned)
    if measured is not None:
        return DraftLength(measured, "fastest in the evaluation of the run", measured, planned)
    if planned is not None:
        return DraftLength(max(1, planned.draft_length), _plan_reason(planned), measured, planned)
    return DraftLength(steps, "the draft steps of the training", measured, planned)


def _plan_reason(planned: PlannedLength) -> str:
    """Return what a plan says for its K, or that it has none."""
    if planned.draft_length == 0:
        return f"the least: by the plan for {planned.hardware}, no K is faster than serving without drafts"
    return f"fastest by the plan for {planned.hardware}, whose times are a ceiling"


def own_warnings(evaluation: Evaluation | None) -> list[str]:
    """Return what a run's evaluation holds against its head or itself: no gain, a failed certificate, doubts."""
    if evaluation is None:
        return []
    gain, k, lines = evaluation.longest_gain, evaluation.draft_length, []
    if gain is not None and not gain.is_clear:
        names = ("the model's own head", "this head")
        lines.append(f"THE RUN'S OWN EVALUATION shows no gain: {gain_sentence(names, gain, k)}")
    if not evaluation.certificate.passed:
        lines.append("THE CERTIFICATE of the run's own evaluation failed; its figures do not count")
    best = fastest_measured(evaluation)
    if _is_doubted(evaluation):
        lines.append("the speeds of the run's own evaluation are doubtful (its report says why), so they choose no K")
    elif best is not None and evaluation.speedup[evaluation.first_batch]["trained"][best].median <= 1:
        lines.append("in the run's own evaluation, no K was faster than plain decoding")
    return lines


def shown_lengths(target: ExportTarget, depth: int, lengths: list[int]) -> list[int]:
    """Return the K whose figures a server can reach: up to the depth of a stacked head, since none runs it beyond."""
    if depth == 1 or target is ExportTarget.hf:
        return lengths
    return [k for k in lengths if k <= depth]
