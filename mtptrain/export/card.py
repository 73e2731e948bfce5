"""What an exported folder says of itself: the model card, and the same facts for programs."""

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
WORST = 5  # tensors that the card names
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
    """Everything that is known of an export, beside the identity of its head.

    Attributes:
        target, form, scheme: the server, the form of the folder, and how the head is stored.
        checkpoint: folder and step it came from.
        untouched: tensors outside the head, whose bytes are those of the source.
        changed: stored weights of the head that differ from those of the source's head, and all of them.
        acceptance: acceptance length by draft length, `before` and `after` storing, and the prompts replayed.
        errors: of every stored weight, by released name.
        warnings: for whoever serves the folder.
        training: provenance of the training run, empty where it is not recorded.
        provenance: of the export itself.
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
    """provenance.json of the run that a checkpoint lies in; empty where there is none."""
    for folder in checkpoint.folder.absolute().parents[:2]:
        path: Path = folder / "provenance.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {}


def serve_command(head: HeadIdentity, export: Export, folder: Path, source: Path) -> str:
    """How the target is started with the folder."""
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
    """Rows about the head and its origin."""
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
    """Rows of acceptance lengths by draft length."""
    before, after = export.acceptance["before"], export.acceptance["after"]
    return "\n".join(f"| {k} | {before[k]:.3f} | {after[k]:.3f} |" for k in before)


def _roundings(export: Export) -> str:
    """Rows of the tensors that storing changed most."""
    worst = sorted(export.errors.items(), key=lambda item: -item[1].absolute)[:WORST]
    return "\n".join(f"| `{name}` | {error.absolute:.3g} | {error.relative:.3g} |" for name, error in worst)


def model_card(head: HeadIdentity, export: Export, folder: Path, source: Path) -> str:
    """The README.md of an exported folder.

    Args:
        head: the identity of the trained head.
        export: the other facts.
        folder: the name that the export gets.
        source: the backbone's folder.
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
