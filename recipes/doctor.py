"""`+recipe=doctor`: diagnose a head and suggest a remedy.

python -m mtptrain +recipe=doctor checkpoint=outputs/distill/RUN
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtptrain.backbone.load import Backbone
from mtptrain.certificate.controls import all_accept_control
from mtptrain.certificate.shifted_target import shifted_target_control
from mtptrain.config import RunConfig
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_traces
from mtptrain.doctor.diagnosis import diagnose, measure_wirings
from mtptrain.doctor.result import DOCTOR_SCHEMA, DoctorControls, DoctorResult, TensorFaults, WiringResult
from mtptrain.doctor.summary import print_diagnosis
from mtptrain.doctor.tensors import examine_tensors, expected_shapes
from mtptrain.errors import CHECK_FAILED, UserError
from mtptrain.mtp.stack import MtpStack, stack_from_tensors
from mtptrain.mtp.start import has_stock, place, read_stock
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import prepare_traces
from mtptrain.release.modules import module_numbers
from mtptrain.release.problems import Problems
from mtptrain.run.folder import FolderUse
from mtptrain.run.storage import write_json
from mtptrain.run.tables import open_console
from mtptrain.run.typed_json import to_json
from mtptrain.training.checkpoint import Checkpoint

PROCESSES = "led"
FOLDER = FolderUse.result
HEAD = "head"  # name of the head under test


@dataclass(frozen=True, slots=True)
class HeadUnderTest:
    """A stored head.

    Attributes:
        tensors: our `mtp.{d}.*`; of a release, the readable ones.
        depth: the number of modules expected.
        report: the result of `examine_tensors`.
    """

    tensors: dict[str, Tensor]
    depth: int
    report: TensorFaults


def examine_stock(backbone: Backbone) -> HeadUnderTest:
    """Return the head that came with the backbone, even a faulty one."""
    tensors, problems = read_stock(backbone)
    depth = max(1, len(module_numbers(tensors)))
    return HeadUnderTest(tensors, depth, examine_tensors(tensors, backbone.config, depth, stored=problems))


def examine_checkpoint(session: Session, checkpoint: Checkpoint) -> HeadUnderTest:
    """Return a trained head, compared with the stock head if that one is sound."""
    backbone = session.backbone
    tensors, depth = checkpoint.tensors(), checkpoint.head_identity(backbone.fingerprint).depth
    stock, problems = read_stock(backbone) if has_stock(backbone) else (None, Problems())
    report = examine_tensors(tensors, backbone.config, depth, None if problems.any() else stock)
    return HeadUnderTest(tensors, depth, report)


def usable_stack(backbone: Backbone, head: HeadUnderTest) -> MtpStack | None:
    """Return the modules without unexpected tensors; None if the other tensors do not make a head."""
    if head.report.missing or head.report.misshaped or head.report.non_finite:
        return None
    known = expected_shapes(backbone.config, head.depth)
    kept = {name: tensor for name, tensor in head.tensors.items() if name in known}
    return place(stack_from_tensors(backbone.config, head.depth, kept, str(backbone.folder)), backbone).eval()


def measure(session: Session, stack: MtpStack) -> tuple[list[WiringResult], DoctorControls]:
    """Return the acceptance of the head under every wiring, and the controls."""
    traces = prepare_traces(session).traces
    model, draft_length = session.backbone.model, session.config.decoding.draft_length
    wirings = measure_wirings(model, stack, traces, draft_length)
    shifted = shifted_target_control(model, {HEAD: stack}, traces, draft_length)[HEAD]
    all_accept = all_accept_control(model, traces[0].prompt.tokens, draft_length)
    return wirings, DoctorControls(shifted_target=shifted, all_accept=all_accept)


def reads(config: RunConfig) -> Settings:
    """Return the settings that a diagnosis reads; its drafts have one length and are greedy."""
    used = ALWAYS | of_backbone(config) | of_traces(config) | {"checkpoint", "overwrite"}
    return used - {"decoding.min_confidence", "decoding.past_depth", "decoding.served_as"}


def check(config: RunConfig) -> None:
    """Refuse sampling and a missing head."""
    if config.decoding.temperature > 0:
        raise UserError(
            f"decoding.temperature={config.decoding.temperature}: the doctor replays greedy texts; leave it at 0"
        )
    if config.checkpoint is None:
        raise UserError("checkpoint=null: the doctor needs a head; give a run folder, a step_* folder, or `stock`")


def run(session: Session) -> None:
    """Examine the tensors, measure every wiring and print the diagnosis; exit with code 3 if the head has a fault."""
    config, run_folder = session.config, session.folder
    setting = str(config.checkpoint)
    checkpoint = None if setting == "stock" else session.checkpoint(setting)
    backbone = session.backbone
    head = examine_stock(backbone) if checkpoint is None else examine_checkpoint(session, checkpoint)
    stack = usable_stack(backbone, head)
    wirings, controls = (None, None) if stack is None else measure(session, stack)
    diagnosis = diagnose(head.report, wirings, controls)
    run_folder.record()
    result = DoctorResult(
        schema=DOCTOR_SCHEMA,
        provenance=run_folder.provenance,
        checkpoint=setting,
        draft_length=config.decoding.draft_length,
        diagnosis=diagnosis,
        tensors=head.report,
        wirings=wirings,
        controls=controls,
    )
    write_json(run_folder.path / "doctor.json", to_json(result))
    print_diagnosis(result, open_console())
    run_folder.print_status(f"wrote {run_folder.path / 'doctor.json'}")
    if not diagnosis.healthy:
        raise SystemExit(CHECK_FAILED)
