"""`+recipe=export`: put a trained head into a folder that a server loads, and check it there.

python -m mtptrain +recipe=export checkpoint=outputs/distill/RUN target=vllm output_dir=DIR
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import DeepseekV4Config

import mtptrain
from mtptrain.backbone.load import BackboneSource
from mtptrain.config import (
    ExportCheck,
    ExportConfig,
    ExportForm,
    ExportScheme,
    ExportTarget,
    PlanConfig,
    RunConfig,
    require,
)
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_speed_plan, of_traces, settings
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import Head
from mtptrain.export.card import (
    NOT_MEASURED,
    further_figures,
    model_card,
    serving_notes,
    shown_length,
    unchanged_tensors,
    verdict,
)
from mtptrain.export.command import serve_command
from mtptrain.export.draft_length import (
    PlannedLength,
    choose_draft_length,
    fastest_measured,
    fastest_planned,
    own_warnings,
    shown_lengths,
)
from mtptrain.export.folder import (
    bytes_needed,
    check_room,
    plan_layout,
    write_config,
    write_draft,
    write_full,
)
from mtptrain.export.origin import find_origin, hub_id, own_evaluation
from mtptrain.export.record import EXPORT, Export, Measured
from mtptrain.export.self_check import changed_weights, check_unchanged, compare_head
from mtptrain.export.servers import SERVERS, check_path, check_target, warnings
from mtptrain.mtp.stack import head_digest
from mtptrain.mtp.start import has_stock, stock_tensors
from mtptrain.recipes.session import Session
from mtptrain.recipes.storing import check_drop, measure, reload_head, replay_stock
from mtptrain.recipes.traces import gather_traces, replay_head, replay_stored
from mtptrain.release.config import stored_scales, stored_scheme
from mtptrain.release.encoding_error import EncodingError
from mtptrain.release.fingerprint import fingerprint
from mtptrain.release.modules import is_release_layout, to_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.run.artifact import seal
from mtptrain.run.folder import FolderUse
from mtptrain.run.hub import check_upload, upload_folder
from mtptrain.run.storage import disk_full_reason, write_text
from mtptrain.training.checkpoint import Checkpoint, HeadIdentity

PROCESSES = "led"
FOLDER = FolderUse.whole
PUSH = "export.push_to_hub"


def export_scheme(config: RunConfig, shards: Shards) -> Scheme:
    """Return the encoding of the exported head: bf16, or that of the backbone with these shards."""
    backbone_scheme: Scheme = stored_scheme(shards)
    return backbone_scheme if config.export.scheme is ExportScheme.target else "bf16"


def check_loads(session: Session, checkpoint: Checkpoint) -> None:
    """Refuse an export that the target cannot load, before the backbone's weights are read."""
    config, shards = session.config, session.source.shards
    assert config.target is not None
    identity = checkpoint.head_identity(session.known_fingerprint)
    check_target(config.target, config.export.form, export_scheme(config, shards), identity.depth, shards)
    check_trained(checkpoint, identity)


def check_trained(checkpoint: Checkpoint, identity: HeadIdentity) -> None:
    """Refuse a checkpoint whose head is the one that its training started from."""
    if head_digest(checkpoint.tensors()) == identity.start["sha256"]:
        raise UserError(
            f"checkpoint={checkpoint.folder}: holds the head that its training started from, unchanged; train it first"
        )


def plan_length(config: RunConfig, model: DeepseekV4Config, measured: Measured) -> PlannedLength | None:
    """Return the fastest K of a plan; None if `backbone=` does not state the sizes of this model."""
    shape = config.backbone.shape
    stated = (shape.hidden_size, len(shape.layer_types), shape.num_experts, shape.vocab_size)
    actual = (model.hidden_size, model.num_hidden_layers, model.n_routed_experts, model.vocab_size)
    if config.hardware is None or stated != actual:
        return None
    return fastest_planned(shape, config.hardware, config.plan or PlanConfig(), measured.positions)


def write_folder(session: Session, checkpoint: Checkpoint, scheme: Scheme, folder: Path) -> None:
    """Write all files of the export except the card and the seal."""
    config, source = session.config, session.source
    head = to_release(checkpoint.tensors(), source.config, scheme, scale_dtype=stored_scales(source.shards))
    trained = checkpoint.head_identity(None)
    facts = {"version": mtptrain.__version__, "mode": trained.mode.value, "steps": trained.steps, "scheme": scheme}
    server = SERVERS.get(config.target) if config.target else None
    facts |= {"checked": f"{server.name} {server.checked}"} if server else {}
    if config.export.form is ExportForm.draft:
        write_draft(source.shards, head, folder, config.export.embeddings)
    else:
        layout, head_bytes = plan_layout(source.shards), sum(tensor.nbytes for tensor in head.values())
        check_room(folder, bytes_needed(source.shards, layout, head_bytes, config.export.shards))
        write_full(source.shards, layout, head, folder, config.export.shards)
    write_config(source.shards, folder, trained.depth, facts)


def stored_stock(source: BackboneSource) -> Mapping[str, Tensor]:
    """Return the stock head by released names; empty if the model came without one."""
    if not has_stock(source):
        return {}
    stock = source.shards.only(HEAD_PREFIX)
    return stock if is_release_layout(stock) else to_release(stock_tensors(source), source.config, "bf16")


@dataclass(frozen=True, slots=True)
class Checks:
    """Results of comparing a written folder with the checkpoint and the model; the attributes are those of `Export`."""

    scheme: Scheme
    errors: dict[str, EncodingError]
    changed: tuple[int, int]
    untouched: int


def check_folder(session: Session, checkpoint: Checkpoint, scheme: Scheme, written: Shards) -> Checks:
    """Read the folder back and compare its tensors.

    Raises:
        UserError: a tensor of the model differs from its source, or the head is the stock head.
    """
    source, stored = session.source, written.only(HEAD_PREFIX)
    errors = compare_head(checkpoint.tensors(), stored, source.config, scheme)
    check_unchanged(source.shards, written)
    is_full = session.config.export.form is ExportForm.full
    if is_full and fingerprint(written) != checkpoint.head_identity(None).backbone:
        raise UserError(f"{written.setting}: config or tensors of the model are not {source.folder}'s; nothing kept")
    changed = changed_weights(stored_stock(source), stored, source.config)
    if changed[0] == 0:
        raise UserError(
            f"{written.setting}: stored as {scheme}, the head is the one that the model came with, value for value; "
            "train it longer, or with mtp.quant_aware=true. Nothing was written"
        )
    return Checks(scheme, errors, changed, untouched=len(written) - len(stored))


def write_checked(session: Session, checkpoint: Checkpoint, temporary: Path) -> tuple[Shards, Checks]:
    """Write the folder and compare its tensors with the checkpoint and the model; return them, and the checks.

    Raises:
        UserError: a check fails.
    """
    scheme = export_scheme(session.config, session.source.shards)
    write_folder(session, checkpoint, scheme, temporary)
    written = Shards(temporary, f"output_dir={session.folder.path}")
    return written, check_folder(session, checkpoint, scheme, written)


def write_measured(
    session: Session, checkpoint: Checkpoint, head: Head, temporary: Path
) -> tuple[Shards, Checks, Measured]:
    """Return the result of `write_checked`, and the acceptance of the head before and after it was stored.

    Raises:
        UserError: a check fails, or storing the head costs too much acceptance.
    """
    traces = gather_traces(session, session.config.evaluation.num_prompts).traces
    before, stock = replay_head(session, head.stack, traces), replay_stock(session, traces)
    written, checks = write_checked(session, checkpoint, temporary)
    zero_first = checkpoint.head_identity(None).zero_first
    reloaded = session.serve(reload_head(session.backbone, written), zero_first)
    measured = measure(session, traces, before, replay_stored(session, reloaded, traces), stock, head.selection)
    check_drop(session.config, measured)
    return written, checks, measured


def build(session: Session, checkpoint: Checkpoint, head: Head | None, warned: list[str], temporary: Path) -> Export:
    """Write the folder, read it back, replay its head, and write its card.

    Args:
        session: of the run.
        checkpoint: the trained head on disk.
        head: the trained head; None compares tensors and replays nothing.
        warned: warnings known so far.
        temporary: the folder until it is complete.
    """
    config, source, target = session.config, session.source, session.config.target
    assert target is not None
    identity, evaluation = checkpoint.head_identity(None), own_evaluation(checkpoint)
    measured = planned = None
    if head is None:
        written, checks = write_checked(session, checkpoint, temporary)
    else:
        written, checks, measured = write_measured(session, checkpoint, head, temporary)
        planned = plan_length(config, source.config, measured)
    export = Export(
        target=target,
        form=config.export.form,
        checkpoint=f"{checkpoint.folder} (step {checkpoint.step})",
        selection=checkpoint.selection(),
        acceptance=measured,
        draft_length=choose_draft_length(target, identity.depth, identity.steps, fastest_measured(evaluation), planned),
        head_files=sorted({written.entries[name].file for name in written.only(HEAD_PREFIX)}),
        warnings=[*warned, *own_warnings(evaluation), *warnings(target, source.shards, identity.depth)],
        origin=find_origin(checkpoint, source.folder, config.backbone.path),
        provenance=session.folder.provenance,
        scheme=checks.scheme,
        errors=checks.errors,
        changed=checks.changed,
        untouched=checks.untouched,
    )
    write_text(temporary / "README.md", model_card(identity, export, *addresses(session)))
    files = [path for path in sorted(temporary.iterdir()) if not path.is_symlink() and path.stat().st_nlink == 1]
    seal(EXPORT, temporary, identity, export, [path.name for path in files])  # a link's bytes are the source's
    return export


def addresses(session: Session) -> tuple[Path, Path]:
    """Return the export and its model as a serving command names them: on the hub if that is where they are."""
    config, folder = session.config, session.folder.path
    source = session.source.folder
    name = hub_id(source, config.backbone.path)
    pushed = Path(config.export.push_to_hub) if config.export.push_to_hub else None
    return pushed or folder, Path(name) if name and pushed else source


def acceptance_lines(export: Export, depth: int) -> list[str]:
    """Return the lines about the acceptance of a head with `depth` modules, or that it was not measured."""
    measured = export.acceptance
    if measured is None:
        return [NOT_MEASURED]
    shown = shown_lengths(export.target, depth, list(measured.before))
    pairs = (f"K={k} {shown_length(measured.before[k])} -> {shown_length(measured.after[k])}" for k in shown)
    return [
        f"acceptance length before and after, {measured.prompts} prompts: {', '.join(pairs)}",
        *further_figures(export.target, measured, shown),
        verdict(measured, export.draft_length.served),
    ]


def summary(export: Export, depth: int, folder: Path, served: tuple[Path, Path]) -> list[str]:
    """Return the lines that the command prints; the last ones are how to serve the folder, as `addresses` names it."""
    (changed, total), best = export.changed, export.draft_length
    return [
        f"exported {total} weights of the head as {export.scheme} to {folder}, {changed} of them changed",
        unchanged_tensors(export),
        "read back from disk: every tensor within the bound of its encoding; the errors are in README.md",
        *acceptance_lines(export, depth),
        *(f"warning: {line}" for line in export.warnings),
        *serving_notes(export.target, export.samples),
        f"serve at K={best.served} ({best.reason}):",
        serve_command(export.target, export.form, *served, best.served, export.samples),
    ]


def reads(config: RunConfig) -> Settings:
    """Return the settings that an export reads: without a replay, none of a measurement or of its plan of K."""
    used = ALWAYS | of_backbone(config) | settings("checkpoint", "export", "target")
    unread = {"export.shards" if config.export.form is ExportForm.draft else "export.embeddings"}
    if config.target not in (None, ExportTarget.vllm):  # only vLLM goes by the path
        unread.add("export.force")
    if config.export.check is ExportCheck.tensors:
        return used - unread - {"export.max_drop", "backbone.weights", "precision", "seed"}
    used |= of_traces(config)
    if config.hardware is not None:
        used |= of_speed_plan(config, "backbone.shape")
    return used - unread - {"decoding.served_as"}  # the target names its server


def check(config: RunConfig) -> None:
    """Refuse an export without a trained head or a target, or to a path that the target misreads."""
    require(config.target is not None, "target", None, "export needs target=vllm, sglang, llama_cpp or hf")
    if config.checkpoint in (None, "stock"):
        raise UserError(f"checkpoint={config.checkpoint}: export needs a trained head; give a run or step_* folder")


def check_paths(target: ExportTarget, folder: Path, export: ExportConfig) -> list[str]:
    """Return warnings about names of the export, on disk and on the hub, that its target misreads.

    Raises:
        UserError: there is one, and `export.force` is not set.
    """
    named = {"output_dir": str(folder.absolute()), PUSH: export.push_to_hub}
    lines = (check_path(target, name, path, export.force) for name, path in named.items() if path)
    return [line for line in lines if line]


def load_head(session: Session, checkpoint: Checkpoint) -> Head | None:
    """Return the head to replay, on its loaded backbone; None if only tensors are compared, which needs no weights.

    Raises:
        UserError: the head was trained on another backbone.
    """
    if session.config.export.check is ExportCheck.replay:
        return session.trained_head(checkpoint)
    checkpoint.head_identity(fingerprint(session.source.shards))
    return None


def run(session: Session) -> None:
    """Export `checkpoint` for `target`; a failure leaves nothing behind."""
    config, run_folder = session.config, session.folder
    assert config.target is not None
    checkpoint = session.checkpoint(str(config.checkpoint))
    folder = run_folder.path
    warned = check_paths(config.target, folder, config.export)
    if config.export.push_to_hub:
        check_upload(config.export.push_to_hub, PUSH)
    check_loads(session, checkpoint)
    head = load_head(session, checkpoint)
    try:
        with run_folder.write_whole() as temporary:
            export = build(session, checkpoint, head, warned, temporary)
    except Exception as error:  # on a full disk each library raises its own error
        reason = disk_full_reason(error)
        if reason is None:
            raise
        raise UserError(f"output_dir={folder}: {reason} ({error}); nothing was kept, free some room") from error
    for line in summary(export, checkpoint.head_identity(None).depth, folder, addresses(session)):
        run_folder.print_status(line)
    if config.export.push_to_hub:
        page = upload_folder(folder, config.export.push_to_hub, PUSH)
        run_folder.print_status(f"uploaded to {page}, private if it is new")
