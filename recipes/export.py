"""`+recipe=export`: put a trained head into a folder that a server loads, and check it there.

python -m mtptrain +recipe=export checkpoint=outputs/distill/RUN target=vllm output_dir=DIR
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import mtptrain
from mtptrain.backbone.load import Backbone
from mtptrain.config import ExportForm, ExportScheme, RunConfig, require
from mtptrain.errors import UserError
from mtptrain.evaluation.heads import Head
from mtptrain.evaluation.metrics import acceptance_length
from mtptrain.export.card import EXPORT, Export, model_card, shown_length, training_provenance
from mtptrain.export.folder import (
    bytes_needed,
    check_room,
    plan_layout,
    write_config,
    write_draft,
    write_full,
)
from mtptrain.export.self_check import changed_weights, check_unchanged, compare_head
from mtptrain.export.servers import check_target, warnings
from mtptrain.mtp.stack import MtpStack, head_digest, stack_from_tensors
from mtptrain.mtp.start import has_stock, place, stock_tensors
from mtptrain.recipes.session import Session
from mtptrain.recipes.traces import check_prompts, gather_traces, replay_head
from mtptrain.release.config import stored_scheme
from mtptrain.release.fingerprint import fingerprint
from mtptrain.release.modules import from_release, is_release_layout, to_release
from mtptrain.release.names import Scheme
from mtptrain.release.shards import HEAD_PREFIX, Shards
from mtptrain.run.artifact import seal
from mtptrain.run.storage import disk_full_reason, write_text
from mtptrain.traces.file import Trace
from mtptrain.training.checkpoint import Checkpoint, HeadIdentity, find_checkpoint


def export_scheme(config: RunConfig, backbone: Backbone) -> Scheme:
    """Return the encoding of the exported head: bf16, or the backbone's."""
    backbone_scheme: Scheme = stored_scheme(backbone.shards)
    return backbone_scheme if config.export.scheme is ExportScheme.target else "bf16"


def check_trained(checkpoint: Checkpoint, identity: HeadIdentity) -> None:
    """Refuse a checkpoint whose head is the one that its training started from."""
    if head_digest(checkpoint.tensors()) == identity.start["sha256"]:
        raise UserError(
            f"checkpoint={checkpoint.folder}: holds the head that its training started from, unchanged; train it first"
        )


def acceptance(session: Session, stack: MtpStack, traces: list[Trace]) -> dict[str, float | None]:
    """Return the acceptance length of a head by draft length; None without verify passes."""
    passes = replay_head(session, stack, traces)
    return {str(k): acceptance_length(passes[k]) for k in passes}


def reload_head(backbone: Backbone, written: Shards) -> MtpStack:
    """Return the head as a server reads it from an exported folder."""
    state = from_release(written.only(HEAD_PREFIX), backbone.config, backbone.model.lm_head.weight.dtype)
    depth = len({name.split(".")[1] for name in state})
    return place(stack_from_tensors(backbone.config, depth, state, str(written.folder)), backbone).eval()


def check_drop(config: RunConfig, figures: dict[str, Any]) -> None:
    """Refuse an encoding that costs more acceptance than `export.max_drop`."""
    for k, before in figures["before"].items():
        if before is None:  # every text ends at its first token
            continue
        drop = before - figures["after"][k]
        if drop > config.export.max_drop:
            raise UserError(
                f"export.max_drop={config.export.max_drop}: storing the head costs {drop:.3f} tokens a pass at K={k} "
                f"({before:.3f} to {figures['after'][k]:.3f}); train with mtp.quant_aware=true, or allow more. Nothing "
                "was written"
            )


def write_folder(config: RunConfig, backbone: Backbone, checkpoint: Checkpoint, scheme: Scheme, folder: Path) -> None:
    """Write all files of the export except the card and the seal."""
    head = to_release(checkpoint.tensors(), backbone.config, scheme)
    trained = checkpoint.head_identity(backbone.fingerprint)
    facts = {"version": mtptrain.__version__, "mode": trained.mode.value, "steps": trained.steps, "scheme": scheme}
    if config.export.form is ExportForm.draft:
        write_draft(backbone.shards, head, folder)
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


def build(session: Session, checkpoint: Checkpoint, head: Head, temporary: Path) -> Export:
    """Write the folder, read it back, replay its head, and write its card."""
    config, run_folder, backbone = session.config, session.folder, session.backbone
    scheme, identity = export_scheme(config, backbone), checkpoint.head_identity(backbone.fingerprint)
    assert config.target is not None
    traces = gather_traces(session, config.evaluation.num_prompts).traces
    before = acceptance(session, head.stack, traces)
    write_folder(config, backbone, checkpoint, scheme, temporary)
    written = Shards(temporary, f"output_dir={run_folder.path}")
    checks = check_folder(config, backbone, checkpoint, scheme, written)
    after = acceptance(session, reload_head(backbone, written), traces)
    export = Export(
        target=config.target,
        form=config.export.form,
        scheme=scheme,
        checkpoint=f"{checkpoint.folder} (step {checkpoint.step})",
        acceptance={"before": before, "after": after, "prompts": len(traces)},
        warnings=warnings(config.target, run_folder.path, identity.depth),
        training=training_provenance(checkpoint),
        provenance=run_folder.provenance,
        **checks,
    )
    check_drop(config, export.acceptance)
    write_text(temporary / "README.md", model_card(identity, export, run_folder.path, backbone.folder))
    files = [path for path in sorted(temporary.iterdir()) if not path.is_symlink() and path.stat().st_nlink == 1]
    seal(EXPORT, temporary, identity, export, [path.name for path in files])  # a link's bytes are the source's
    return export


def summary(export: Export, folder: Path) -> list[str]:
    """Return the lines that the command prints."""
    changed, total = export.changed
    pairs = (
        f"K={k} {shown_length(before)} -> {shown_length(export.acceptance['after'][k])}"
        for k, before in export.acceptance["before"].items()
    )
    return [
        f"exported {total} weights of the head as {export.scheme} to {folder}, {changed} of them other than before",
        f"unchanged: {export.untouched} tensors of the model, by SHA-256",
        "read back from disk: every tensor within the bound of its encoding; the errors are in README.md",
        f"acceptance length before and after, {export.acceptance['prompts']} prompts: {', '.join(pairs)}",
        *(f"warning: {line}" for line in export.warnings),
    ]


def check(config: RunConfig) -> None:
    """Refuse an export without a trained head or a target."""
    require(config.target is not None, "target", None, "export needs target=vllm, target=sglang or target=hf")
    if config.checkpoint in (None, "stock"):
        raise UserError(f"checkpoint={config.checkpoint}: export needs a trained head; give a run or step_* folder")


def run(session: Session) -> None:
    """Export `checkpoint` for `target`; a failure leaves nothing behind."""
    config, run_folder = session.config, session.folder
    assert config.target is not None
    checkpoint = find_checkpoint(Path(str(config.checkpoint)))
    folder = run_folder.require_empty()
    check_prompts(session)
    backbone = session.backbone
    head = session.trained_head(checkpoint)
    scheme, backbone_scheme = export_scheme(config, backbone), stored_scheme(backbone.shards)
    check_target(config.target, config.export.form, scheme, head.stack.depth, backbone.shards, backbone_scheme)
    check_trained(checkpoint, checkpoint.head_identity(backbone.fingerprint))
    try:
        with run_folder.write_whole() as temporary:
            export = build(session, checkpoint, head, temporary)
    except Exception as error:  # on a full disk each library raises its own error
        reason = disk_full_reason(error)
        if reason is None:
            raise
        raise UserError(f"output_dir={folder}: {reason} ({error}); nothing was kept, free some room") from error
    for line in summary(export, folder):
        run_folder.print_status(line)
