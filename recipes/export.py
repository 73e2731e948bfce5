"""`+recipe=export`: put a trained head into a folder that a server loads, and check it there.

python -m mtptrain +recipe=export checkpoint=outputs/distill/RUN target=vllm output_dir=DIR
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DeepseekV4Config

import mtptrain
from mtptrain.backbone.load import Backbone
from mtptrain.config import ExportForm, ExportScheme, PlanConfig, RunConfig, require
from mtptrain.config.reads import ALWAYS, Settings, of_backbone, of_speed_plan, of_traces, settings
from mtptrain.errors import UserError
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.metrics import acceptance_length, by_position, paired_gain
from mtptrain.export.card import (
    EXPORT,
    Export,
    Measured,
    drawn,
    further_figures,
    model_card,
    serving_notes,
    shown_length,
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
from mtptrain.export.self_check import changed_weights, check_unchanged, compare_head
from mtptrain.export.servers import SERVERS, check_path, check_target, warnings
from mtptrain.mtp.stack import MtpStack, head_digest, stack_from_tensors
from mtptrain.mtp.start import has_stock, place, stock_tensors
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import gather_traces, replay_head, replay_stored
from mtptrain.release.config import stored_scales, stored_scheme
from mtptrain.release.fingerprint import fingerprint
from mtptrain.release.modules import from_release, is_release_layout, to_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.run.artifact import seal
from mtptrain.run.folder import FolderUse
from mtptrain.run.hub import check_upload, upload_folder
from mtptrain.run.storage import disk_full_reason, write_text
from mtptrain.traces.file import Trace
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


def replay_stock(session: Session, traces: list[Trace]) -> CountsByLength | None:
    """Return the counts of the head that came with the model; None if it has none, or one that cannot run."""
    if not has_stock(session.backbone):
        return None
    try:
        return replay_head(session, session.stock_head().stack, traces)
    except UserError as error:
        session.folder.print_status(f"no comparison with the model's own head: {error}")
        return None


def reload_head(backbone: Backbone, written: Shards) -> MtpStack:
    """Return the head as a server reads it from an exported folder."""
    config = DeepseekV4Config.from_pretrained(written.folder)  # says no more that the model came with DSpark blocks
    state = from_release(written.only(HEAD_PREFIX), config, backbone.model.lm_head.weight.dtype)
    depth = len({name.split(".")[1] for name in state})
    return place(stack_from_tensors(backbone.config, depth, state, str(written.folder)), backbone).eval()


def lengths(counts: CountsByLength) -> dict[int, float | None]:
    """Return the acceptance length by K."""
    return {k: acceptance_length(counts[k]) for k in counts}


def measure(
    session: Session,
    traces: list[Trace],
    before: CountsByLength,
    stored: tuple[CountsByLength, CountsByLength | None, CountsByLength | None],
    stock: CountsByLength | None,
) -> Measured:
    """Return the acceptance of a head before and after it was stored, and its gain over the stock head.

    `stored` is the result of `replay_stored`.
    """
    (after, other, served), other_policy = stored, session.policy.with_other_drafts
    groups = [trace.prompt.group for trace in traces]
    gains = {} if stock is None else {k: paired_gain(stock[k], after[k], groups) for k in after}
    known = {k: gain for k, gain in gains.items() if gain is not None}
    return Measured(
        prompts=len(traces),
        policy=drawn(session.policy),
        before=lengths(before),
        after=lengths(after),
        positions=by_position(after[max(after)]).conditional,
        gain=known or None,
        other=(drawn(other_policy), lengths(other)) if other_policy and other else None,
        served=lengths(served) if served else None,
    )


def check_drop(config: RunConfig, measured: Measured) -> None:
    """Refuse an encoding that costs more acceptance than `export.max_drop`."""
    for k, before in measured.before.items():
        after = measured.after[k]
        if before is None or after is None:  # every text ends at its first token
            continue
        drop = before - after
        if drop > config.export.max_drop:
            raise UserError(
                f"export.max_drop={config.export.max_drop}: storing the head costs {drop:.3f} tokens a pass at K={k} "
                f"({before:.3f} to {measured.after[k]:.3f}); train with mtp.quant_aware=true, or allow more. Nothing "
                "was written"
            )


def plan_length(config: RunConfig, backbone: Backbone, measured: Measured) -> PlannedLength | None:
    """Return the fastest K of a plan; None if `backbone=` does not state the sizes of this model."""
    shape, model = config.backbone.shape, backbone.config
    stated = (shape.hidden_size, len(shape.layer_types), shape.num_experts, shape.vocab_size)
    actual = (model.hidden_size, model.num_hidden_layers, model.n_routed_experts, model.vocab_size)
    if config.hardware is None or stated != actual:
        return None
    return fastest_planned(shape, config.hardware, config.plan or PlanConfig(), measured.positions)


def write_folder(config: RunConfig, backbone: Backbone, checkpoint: Checkpoint, scheme: Scheme, folder: Path) -> None:
    """Write all files of the export except the card and the seal."""
    head = to_release(checkpoint.tensors(), backbone.config, scheme, scale_dtype=stored_scales(backbone.shards))
    trained = checkpoint.head_identity(backbone.fingerprint)
    facts = {"version": mtptrain.__version__, "mode": trained.mode.value, "steps": trained.steps, "scheme": scheme}
    server = SERVERS.get(config.target) if config.target else None
    facts |= {"checked": f"{server.name} {server.checked}"} if server else {}
    if config.export.form is ExportForm.draft:
        write_draft(backbone.shards, head, folder, config.export.embeddings)
    else:
        layout, head_bytes = plan_layout(backbone.shards), sum(tensor.nbytes for tensor in head.values())
        check_room(folder, bytes_needed(backbone.shards, layout, head_bytes, config.export.shards))
        write_full(backbone.shards, layout, head, folder, config.export.shards)
    write_config(backbone.shards, folder, trained.depth, facts)


def stored_stock(backbone: Backbone) -> Mapping[str, Tensor]:
    """Return the stock head by released names; empty if the model came without one."""
    if not has_stock(backbone):
        return {}
    stock = backbone.shards.only(HEAD_PREFIX)
    return stock if is_release_layout(stock) else to_release(stock_tensors(backbone), backbone.config, "bf16")


def check_folder(
    config: RunConfig, backbone: Backbone, checkpoint: Checkpoint, scheme: Scheme, written: Shards
) -> dict[str, Any]:
    """Read the folder back and return `errors`, `changed` and `untouched` of `Export`.

    Raises:
        UserError: a tensor of the model differs from its source, or the head is the stock head.
    """
    stored = written.only(HEAD_PREFIX)
    errors = compare_head(checkpoint.tensors(), stored, backbone.config, scheme)
    check_unchanged(backbone.shards, written)
    if config.export.form is ExportForm.full and fingerprint(written) != backbone.fingerprint:
        raise UserError(f"{written.setting}: config or tensors of the model are not {backbone.folder}'s; nothing kept")
    changed = changed_weights(stored_stock(backbone), stored, backbone.config)
    if changed[0] == 0:
        raise UserError(
            f"{written.setting}: stored as {scheme}, the head is the one that the model came with, value for value; "
            "train it longer, or with mtp.quant_aware=true. Nothing was written"
        )
    return {"errors": errors, "changed": changed, "untouched": len(written) - len(stored)}


def write_measured(
    session: Session, checkpoint: Checkpoint, head: Head, temporary: Path
) -> tuple[Shards, dict[str, Any], Measured]:
    """Write the folder, check it, and replay the head before and after; return its tensors, the checks, and both.

    Raises:
        UserError: a check fails, or storing the head costs too much acceptance.
    """
    config, backbone = session.config, session.backbone
    scheme = export_scheme(config, backbone.shards)
    traces = gather_traces(session, config.evaluation.num_prompts).traces
    before, stock = replay_head(session, head.stack, traces), replay_stock(session, traces)
    write_folder(config, backbone, checkpoint, scheme, temporary)
    written = Shards(temporary, f"output_dir={session.folder.path}")
    checks = check_folder(config, backbone, checkpoint, scheme, written)
    zero_first = checkpoint.head_identity(backbone.fingerprint).zero_first
    stored = replay_stored(session, session.serve(reload_head(backbone, written), zero_first), traces)
    measured = measure(session, traces, before, stored, stock)
    check_drop(config, measured)
    return written, {"scheme": scheme, **checks}, measured


def build(session: Session, checkpoint: Checkpoint, head: Head, warned: list[str], temporary: Path) -> Export:
    """Write the folder, read it back, replay its head, and write its card.

    Args:
        session: of the run.
        checkpoint: the trained head on disk.
        head: the trained head.
        warned: warnings known so far.
        temporary: the folder until it is complete.
    """
    config, backbone, target = session.config, session.backbone, session.config.target
    assert target is not None
    identity = checkpoint.head_identity(backbone.fingerprint)
    written, checks, measured = write_measured(session, checkpoint, head, temporary)
    evaluation, planned = own_evaluation(checkpoint), plan_length(config, backbone, measured)
    export = Export(
        target=target,
        form=config.export.form,
        checkpoint=f"{checkpoint.folder} (step {checkpoint.step})",
        acceptance=measured,
        draft_length=choose_draft_length(target, identity.depth, identity.steps, fastest_measured(evaluation), planned),
        head_files=sorted({written.entries[name].file for name in written.only(HEAD_PREFIX)}),
        warnings=[*warned, *own_warnings(evaluation), *warnings(target, backbone.shards, identity.depth)],
        origin=find_origin(checkpoint, backbone.folder, config.backbone.path),
        provenance=session.folder.provenance,
        **checks,
    )
    write_text(temporary / "README.md", model_card(identity, export, *addresses(session)))
    files = [path for path in sorted(temporary.iterdir()) if not path.is_symlink() and path.stat().st_nlink == 1]
    seal(EXPORT, temporary, identity, export, [path.name for path in files])  # a link's bytes are the source's
    return export


def addresses(session: Session) -> tuple[Path, Path]:
    """Return the export and its model as a serving command names them: on the hub if that is where they are."""
    config, folder = session.config, session.folder.path
    name = hub_id(session.backbone.folder, config.backbone.path)
    pushed = Path(config.export.push_to_hub) if config.export.push_to_hub else None
    return pushed or folder, Path(name) if name and pushed else session.backbone.folder


def summary(export: Export, depth: int, folder: Path, served: tuple[Path, Path]) -> list[str]:
    """Return the lines that the command prints; the last ones are how to serve the folder, as `addresses` names it."""
    (changed, total), measured, best = export.changed, export.acceptance, export.draft_length
    shown = shown_lengths(export.target, depth, list(measured.before))
    pairs = (f"K={k} {shown_length(measured.before[k])} -> {shown_length(measured.after[k])}" for k in shown)
    return [
        f"exported {total} weights of the head as {export.scheme} to {folder}, {changed} of them other than before",
        f"unchanged: {export.untouched} tensors of the model, by SHA-256",
        "read back from disk: every tensor within the bound of its encoding; the errors are in README.md",
        f"acceptance length before and after, {measured.prompts} prompts: {', '.join(pairs)}",
        *further_figures(export.target, measured, shown),
        verdict(measured, best.served),
        *(f"warning: {line}" for line in export.warnings),
        *serving_notes(export.target),
        f"serve at K={best.served} ({best.reason}):",
        serve_command(export.target, export.form, *served, best.served),
    ]


def reads(config: RunConfig) -> Settings:
    """Return the settings that an export reads."""
    used = ALWAYS | of_backbone(config) | of_traces(config) | settings("checkpoint", "export", "target")
    if config.hardware is not None:
        used |= of_speed_plan(config, "backbone.shape")
    unread = "export.shards" if config.export.form is ExportForm.draft else "export.embeddings"
    return used - {unread, "decoding.served_as"}  # the target names its server


def check(config: RunConfig) -> None:
    """Refuse an export without a trained head or a target, or to a path that the target misreads."""
    require(config.target is not None, "target", None, "export needs target=vllm, sglang, llama_cpp or hf")
    if config.checkpoint in (None, "stock"):
        raise UserError(f"checkpoint={config.checkpoint}: export needs a trained head; give a run or step_* folder")


def run(session: Session) -> None:
    """Export `checkpoint` for `target`; a failure leaves nothing behind."""
    config, run_folder = session.config, session.folder
    assert config.target is not None
    checkpoint = session.checkpoint(str(config.checkpoint))
    folder = run_folder.path
    warned = check_path(config.target, folder, config.export.force)
    if config.export.push_to_hub:
        check_upload(config.export.push_to_hub, PUSH)
    check_loads(session, checkpoint)
    head = session.trained_head(checkpoint)
    try:
        with run_folder.write_whole() as temporary:
            export = build(session, checkpoint, head, [warned] if warned else [], temporary)
    except Exception as error:  # on a full disk each library raises its own error
        reason = disk_full_reason(error)
        if reason is None:
            raise
        raise UserError(f"output_dir={folder}: {reason} ({error}); nothing was kept, free some room") from error
    for line in summary(export, head.stack.depth, folder, addresses(session)):
        run_folder.print_status(line)
    if config.export.push_to_hub:
        page = upload_folder(folder, config.export.push_to_hub, PUSH)
        run_folder.print_status(f"uploaded to {page}, private if it is new")
