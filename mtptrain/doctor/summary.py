"""The diagnosis of a head as the terminal shows it."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from mtptrain.doctor.result import DoctorResult, TensorFaults
from mtptrain.evaluation.certificate_result import Outcome, ShiftedTargetControl
from mtptrain.run.tables import print_table

WIRINGS_NOTE = (
    "Wiring: the inputs of a draft step, the right ones or those of a usual mistake (docs/doctor.md). Against right: "
    "the paired difference in tokens a pass."
)


def print_diagnosis(result: DoctorResult, console: Console) -> None:
    """Print the verdict, faults and remedies, then the figures."""
    console.print(result.diagnosis.verdict, style="bold", highlight=False)
    for finding in result.diagnosis.findings:
        console.print(f"- {finding}", highlight=False)
    lists = {field.name: getattr(result.tensors, field.name) for field in fields(TensorFaults)}
    counts = ", ".join(f"{kind} {len(names)}" for kind, names in lists.items() if isinstance(names, list))
    console.print(f"\ntensors: {result.tensors.expected} expected; {counts}", highlight=False)
    if result.wirings is None or result.controls is None:
        console.print("acceptance: not measured, these tensors do not make a head", highlight=False)
        return
    table = Table("wiring", "tokens a pass", "against right", "95 % interval", box=None)
    for row in result.wirings:
        low, high = row.against_right.interval
        gain = row.against_right.gain
        table.add_row(row.wiring, f"{row.acceptance_length:.2f}", f"{gain:+.3f}", f"{low:+.3f} to {high:+.3f}")
    print_table(console, table)
    console.print(WIRINGS_NOTE, highlight=False)
    ceiling = result.controls.all_accept
    console.print(
        f"control: {_shifted_target(result.controls.shifted_target)}\n"
        f"control: the backbone drafting for itself emits {ceiling.acceptance_length:.2f} of "
        f"{ceiling.ceiling} tokens a pass: {'passed' if ceiling.passed else 'FAILED'}",
        highlight=False,
    )


def _shifted_target(control: ShiftedTargetControl) -> str:
    if control.outcome is Outcome.not_tested:
        return "shifted target: not tested, these texts are too few or too much alike"
    return (
        f"drafts agree with their own text {control.agreement:.3f}, with another prompt's in its place "
        f"{control.shifted:.3f} (chance {control.chance:.3f}, p={control.p_value:.2g}): "
        f"{'passed' if control.outcome is Outcome.passed else 'FAILED'}"
    )
