"""`+recipe=doctor`: what is wrong with a head, and what to do about it.

python -m mtptrain +recipe=doctor checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtptrain.backbone.load import Backbone
from mtptrain.checkpoint import find_checkpoint
from mtptrain.config import RunConfig
from mtptrain.errors import UserError
from mtptrain.evaluation.controls import all_accept_control, shifted_target_control
from mtptrain.evaluation.diagnosis import diagnose, measure_wirings
from mtptrain.evaluation.head_tensors import examine_tensors, expected_shapes
from mtptrain.mtp.initial import has_stock, place, stock_tensors
from mtptrain.mtp.stack import MtpStack, num_modules, stack_from_tensors
from mtptrain.recipes.inputs import check_owner, heldout_corpus, open_backbone
from mtptrain.recipes.traces import prepare_traces
from mtptrain.run_folder import RunFolder
from mtptrain.storage import write_json

SCHEMA = 1
UNHEALTHY = 3  # exit code: the diagnosis was made and something is wrong


def stored_head(config: RunConfig, backbone: Backbone) -> tuple[dict[str, Tensor], int, dict[str, Tensor] | None]:
    """Tensors of the head as stored, modules it should have, and the stock head's tensors to compare with."""
    if config.checkpoint is None:
        raise UserError("checkpoint=null: the doctor needs a head; give a run folder, a step_* folder, or `stock`")
    if config.checkpoint == "stock":
        tensors = stock_tensors(backbone)
        return tensors, num_modules(tensors), None
    checkpoint = find_checkpoint(Path(config.checkpoint))
    check_owner(backbone, checkpoint)
    stock = stock_tensors(backbone) if has_stock(backbone) else None
    return checkpoint.tensors(), checkpoint.owner["depth"], stock


def usable_stack(backbone: Backbone, tensors: dict[str, Tensor], depth: int, report: dict[str, Any]) -> MtpStack | None:
    """The modules, unexpected tensors left out; None where the others do not make a head."""
    if report["missing"] or report["misshaped"] or report["non_finite"]:
        return None
    known = expected_shapes(backbone.config, depth)
    kept = {name: tensor for name, tensor in tensors.items() if name in known}
    return place(stack_from_tensors(backbone.config, depth, kept, str(backbone.folder)), backbone).eval()


def print_diagnosis(result: dict[str, Any], console: Console) -> None:
    """The verdict, what is wrong and what to do, then the figures."""
    diagnosis, tensors = result["diagnosis"], result["tensors"]
    console.print(diagnosis["verdict"], style="bold", highlight=False)
    for finding in diagnosis["findings"]:
        console.print(f"- {finding}", highlight=False)
    kinds = ("missing", "unexpected", "misshaped", "non_finite", "zero", "constant", "same_as_stock")
    counts = ", ".join(f"{kind} {len(tensors[kind])}" for kind in (*kinds, "same_as_depth_before"))
    console.print(f"\ntensors: {tensors['expected']} expected; {counts}", highlight=False)
    if result["wirings"] is None:
        console.print("acceptance: not measured, these tensors do not make a head", highlight=False)
        return
    table = Table("wiring", "tokens a pass", "against right", "95 % interval", box=None)
    for row in result["wirings"]:
        low, high = row["against_right"]["interval"]
        gain = row["against_right"]["gain"]
        table.add_row(row["wiring"], f"{row['acceptance_length']:.2f}", f"{gain:+.3f}", f"{low:+.3f} to {high:+.3f}")
    console.print(table, highlight=False)
    control, ceiling = result["controls"]["shifted_target"], result["controls"]["all_accept"]
    console.print(
        f"control: agrees with its own text {control['agreement']:.3f}, with another prompt's {control['shifted']:.3f} "
        f"(chance {control['chance']:.3f}): {'passed' if control['passed'] else 'FAILED'}\n"
        f"control: the backbone drafting for itself emits {ceiling['acceptance_length']:.2f} of "
        f"{ceiling['ceiling']} tokens a pass: {'passed' if ceiling['passed'] else 'FAILED'}",
        highlight=False,
    )


def run(config: RunConfig, run_folder: RunFolder) -> None:
    """Examine the tensors, measure every wiring, say what is wrong; exit code 3 when something is."""
    if config.decoding.temperature > 0:
        raise UserError(
            f"decoding.temperature={config.decoding.temperature}: the doctor replays greedy texts; leave it at 0"
        )
    if config.checkpoint not in (None, "stock"):
        find_checkpoint(Path(str(config.checkpoint)))  # before the backbone is loaded
    backbone = open_backbone(config)
    tensors, depth, stock = stored_head(config, backbone)
    report = examine_tensors(tensors, backbone.config, depth, stock)
    traces = prepare_traces(config, run_folder, backbone, heldout_corpus(config, backbone)).traces
    stack = usable_stack(backbone, tensors, depth, report)
    wirings: list[dict[str, Any]] | None = None
    controls: dict[str, Any] = {}
    if stack is not None:
        wirings = measure_wirings(backbone.model, stack, traces, config.decoding.draft_length)
        controls = {
            "shifted_target": shifted_target_control(backbone.model, stack, traces),
            "all_accept": all_accept_control(backbone.model, traces[0].prompt.tokens, config.decoding.draft_length),
        }
    diagnosis = diagnose(report, wirings, controls)
    result = {
        "schema": SCHEMA,
        "provenance": run_folder.provenance,
        "checkpoint": config.checkpoint,
        "draft_length": config.decoding.draft_length,
        "diagnosis": diagnosis,
        "tensors": report,
        "wirings": wirings,
        "controls": controls,
    }
    write_json(run_folder.path / "doctor.json", result)
    print_diagnosis(result, Console())
    run_folder.say(f"wrote {run_folder.path / 'doctor.json'}")
    if not diagnosis["healthy"]:
        raise SystemExit(UNHEALTHY)
