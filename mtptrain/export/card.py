"""The model card of an exported folder, and the same facts as a manifest for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mtptrain
from mtptrain.config import ExportForm, ExportTarget
from mtptrain.release.encoding_error import EncodingError
from mtptrain.run.artifact import Kind
from mtptrain.run.provenance import Provenance
from mtptrain.training.checkpoint import Checkpoint, HeadIdentity

RECORD = "mtptrain_export.json"
WORST = 5  # tensors that the card lists
CARD = """---
library_name: mtptrain
tags: [multi-token-prediction, speculative-decoding, deepseek_v4]
---

# A trained multi-token-prediction head for DeepSeek-V4

Written by `+recipe=export`; the same facts for programs are in `{record}`.

| | |
|---|---|
{facts}

## Acceptance length

Greedy, on {prompts} prompts that the model continued itself, by draft length K; the trained head before it was \
stored, and as it was read back from this folder.

| K | before | after |
|---|---|---|
{lengths}

## Serve

```
{command}
```

Warnings:

{warnings}

## Largest rounding errors

| tensor | largest change | in units of its block's scale |
|---|---|---|
{roundings}
"""


@dataclass(frozen=True, slots=True)
class Export:
    """The facts of an export besides the identity of its head.

    Attributes:
        target, form, scheme: the server, the form of the folder, and the storage of the head.
        checkpoint: folder and step of the head.
        untouched: number of tensors outside the head; their bytes equal the source's.
        changed: number of stored weights that differ from the source's head, and number of all stored weights.
        acceptance: acceptance length by draft length, `before` and `after` storing, and the number of `prompts`.
        errors: rounding error of every stored weight, by released name.
        warnings: warnings for serving.
        training: provenance of the training run, empty if it is not recorded.
        provenance: provenance of the export.
    """

    target: ExportTarget
    form: ExportForm
    scheme: str
    checkpoint: str
    untouched: int
    changed: tuple[int, int]
    acceptance: dict[str, Any]
    errors: dict[str, EncodingError]
    warnings: list[str]
    training: dict[str, Any]
    provenance: Provenance


EXPORT: Kind[HeadIdentity, Export] = Kind(
    name="exported model",
    schema=1,
    identity=HeadIdentity,
    content=Export,
    settings={"backbone": "backbone.path"},
    manifest=RECORD,
    missing="give the folder of +recipe=export",
    damaged="export it anew",
    repair="export it anew",
)


def training_provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return provenance.json of the run that holds a checkpoint; empty if the run has none."""
    for folder in checkpoint.folder.absolute().parents[:2]:
        path: Path = folder / "provenance.json"
        if path.is_file():
            provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return provenance
    return {}


def serve_command(head: HeadIdentity, export: Export, folder: Path, source: Path) -> str:
    """Return the command that starts the target with the folder."""
    if export.target is ExportTarget.sglang:
        return (
            f"python -m sglang.launch_server --model-path {folder} --speculative-algorithm EAGLE \\\n"
            f"    --speculative-num-steps {head.steps} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {head.steps + 1}"
        )
    if export.target is ExportTarget.hf:
        return f"python -m mtptrain +recipe=evaluate checkpoint=stock backbone.path={folder}"
    draft = f'"model": "{folder}", ' if export.form is ExportForm.draft else ""
    model = source if export.form is ExportForm.draft else folder
    settings = f'{{"method": "mtp", {draft}"num_speculative_tokens": {head.steps}}}'
    return f"vllm serve {model} --speculative-config '{settings}'"


def _facts(head: HeadIdentity, export: Export) -> str:
    """Return table rows about the head and its origin."""
    training = export.training
    command = " ".join(training.get("command", [])) or "not recorded"
    trained = f"{training.get('started', '?')}, commit {training.get('git_commit')}" if training else "not recorded"
    facts = {
        "mode": f"{head.mode.value}, {head.depth} module(s)",
        "trained on": f"{head.steps} draft step(s)",
        "stored as": f"{export.scheme}, for {export.target.value}, {export.form.value} folder",
        "model": f"fingerprint {head.backbone}; {export.untouched} tensors, unchanged byte for byte",
        "head": f"{export.changed[0]} of {export.changed[1]} stored weights differ from the model's own head",
        "checkpoint": export.checkpoint,
        "started from": json.dumps(head.start),
        "training": f"`{command}` ({trained})",
        "mtptrain": f"{mtptrain.__version__}, commit {export.provenance.git_commit}",
    }
    return "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())


def _lengths(export: Export) -> str:
    """Return table rows of acceptance lengths by draft length."""
    before, after = export.acceptance["before"], export.acceptance["after"]
    return "\n".join(f"| {k} | {shown_length(before[k])} | {shown_length(after[k])} |" for k in before)


def shown_length(length: float | None) -> str:
    """Return an acceptance length with three decimals, or `-` without verify passes."""
    return "-" if length is None else f"{length:.3f}"


def _roundings(export: Export) -> str:
    """Return table rows of the tensors with the largest rounding errors."""
    worst = sorted(export.errors.items(), key=lambda item: -item[1].absolute)[:WORST]
    return "\n".join(f"| `{name}` | {error.absolute:.3g} | {error.relative:.3g} |" for name, error in worst)


def model_card(head: HeadIdentity, export: Export, folder: Path, source: Path) -> str:
    """Return the README.md of an exported folder.

    Args:
        head: identity of the trained head.
        export: facts of the export.
        folder: final name of the export's folder.
        source: folder of the backbone.
    """
    return CARD.format(
        record=RECORD,
        facts=_facts(head, export),
        prompts=export.acceptance["prompts"],
        lengths=_lengths(export),
        command=serve_command(head, export, folder, source),
        warnings="\n".join(f"- {line}" for line in export.warnings or ["none"]),
        roundings=_roundings(export),
    )
