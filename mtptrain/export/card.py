"""The model card of an exported folder, and its sentences for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import mtptrain
from mtptrain.config import ExportTarget
from mtptrain.evaluation.compare import gain_sentence
from mtptrain.evaluation.head_result import chosen_text
from mtptrain.export.command import serve_command
from mtptrain.export.draft_length import shown_lengths
from mtptrain.export.record import Export, Measured
from mtptrain.export.servers import SERVERS, sampling_note
from mtptrain.training.checkpoint import EXPORT_MANIFEST, HeadIdentity

WORST = 5  # tensors that the card lists
NO_GAIN = "NOT BETTER THAN THE MODEL'S OWN HEAD on these prompts"
TAGS = ["multi-token-prediction", "speculative-decoding", "deepseek_v4"]
CARD = """---
{metadata}
---

# A trained multi-token-prediction head for DeepSeek-V4

Written by `+recipe=export`; the same facts for programs are in `{record}`.

| | |
|---|---|
{facts}

## Acceptance

{acceptance}

## Serve

```
{command}
```

{notes}

Warnings:

{warnings}

## Largest rounding errors

| tensor | largest change | in units of its block's scale |
|---|---|---|
{roundings}
"""
NOT_MEASURED = (
    "Acceptance was not measured: export.check=tensors compares tensors alone. +recipe=evaluate checkpoint=FOLDER "
    "measures it."
)
ACCEPTANCE = """{verdict}

Tokens a pass at {policy}, on {prompts} prompts that the model continued itself, by draft length K: the trained head \
before it was stored, and as it was read back from this folder; the gain is over the model's own head, with its 95 % \
interval.

| K | before | after | gain |
|---|---|---|---|
{lengths}
{further}
Share of drafts kept at each position, once all before it were kept: {positions}."""


def verdict(measured: Measured, k: int) -> str:
    """Return one sentence about the gain over the model's own head at K = `k`, or at the longest measured K below."""
    k = min(k, measured.longest)
    if measured.gain is None:
        return "The model came without a head to compare with."
    gain = measured.gain[k]
    sentence = gain_sentence(("the model's own head", "this head"), gain, k)
    sentence += f" at K={k}" if gain.is_clear or gain.is_clear_loss else ""
    return sentence if gain.is_clear else f"{NO_GAIN}: {sentence}"


def unchanged_tensors(export: Export) -> str:
    """Return how many tensors of the model the folder holds, unchanged; a draft folder may hold none."""
    count = export.untouched
    return f"{count} tensors of the model, unchanged byte for byte" if count else "no tensor of the model in the folder"


def _facts(head: HeadIdentity, export: Export) -> str:
    """Return table rows about the head and its origin."""
    training, origin, best = export.origin.training, export.origin, export.draft_length
    command = " ".join(training.get("command", [])) or "not recorded"
    trained = f"{training.get('started', '?')}, commit {training.get('git_commit')}" if training else "not recorded"
    server = SERVERS.get(export.target)
    facts = {
        "mode": f"{head.mode.value}, {head.depth} module(s)",
        "trained on": f"{head.steps} draft step(s)",
        "training data": origin.data or "not recorded",
        "stored as": f"{export.scheme}, for {export.target.value}, {export.form.value} folder",
        "loader checked": f"{server.name} {server.checked}" if server else "transformers",
        "model": f"{origin.base_model or 'no hub id known'}, fingerprint {head.backbone}; {unchanged_tensors(export)}",
        "licence": f"{origin.license}, the model's" if origin.license else "not stated in the model's folder",
        "head": f"{export.changed[0]} of {export.changed[1]} stored weights differ from the model's own head",
        "draft length": f"{best.served}, {best.reason}; fastest in the run's evaluation: {best.measured or 'unknown'}, "
        f"by the plan: {best.planned.draft_length if best.planned else 'unknown'}",
        "checkpoint": export.checkpoint,
        "started from": json.dumps(head.start),
        "training": f"`{command}` ({trained})",
        "mtptrain": f"{mtptrain.__version__}, commit {export.provenance.git_commit}",
    }
    return "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())


def _lengths(measured: Measured, shown: list[int]) -> str:
    """Return table rows of acceptance lengths by draft length."""
    return "\n".join(
        f"| {k} | {shown_length(measured.before[k])} | {shown_length(measured.after[k])} | {_gain(measured, k)} |"
        for k in shown
    )


def _gain(measured: Measured, k: int) -> str:
    if measured.gain is None:
        return "-"
    low, high = measured.gain[k].interval
    return f"{measured.gain[k].gain:+.3f} ({low:+.3f} to {high:+.3f})"


def other_drafts(measured: Measured, shown: list[int]) -> str:
    """Return one sentence about the other kind of draft; empty at temperature 0."""
    if measured.other is None:
        return ""
    policy, lengths = measured.other
    pairs = ", ".join(f"K={k} {shown_length(lengths[k])}" for k in shown)
    return f"The same head at {policy}: {pairs}."


def served_numerics(target: ExportTarget, measured: Measured, shown: list[int]) -> str:
    """Return one sentence about acceptance with the numerics of the target; empty for `hf`."""
    server = SERVERS.get(target)
    if server is None or measured.served is None:
        return ""
    greedy = measured.other if server.draws_greedily and measured.samples else None
    compared = greedy[1] if greedy else measured.after
    pairs = []
    for k in shown:
        trained, served = compared[k], measured.served[k]
        change = "" if trained is None or served is None else f" ({served - trained:+.4f})"
        pairs.append(f"K={k} {shown_length(served)}{change}")
    numerics = f"{server.numerics}; greedy drafts" if greedy else server.numerics
    return f"As {server.name} computes ({numerics}): {', '.join(pairs)}."


def further_figures(target: ExportTarget, measured: Measured, shown: list[int]) -> list[str]:
    """Return the sentences about the other kind of draft, the target's numerics, and prompts that chose the head."""
    chosen = chosen_text("this head", measured.chosen_on)
    lines = [other_drafts(measured, shown), served_numerics(target, measured, shown)]
    return [line for line in [*lines, f"{chosen[0].upper()}{chosen[1:]}." if chosen else ""] if line]


def _positions(measured: Measured, shown: list[int]) -> str:
    """Return the share kept at each position that is served."""
    shares = measured.positions[: max(shown)]
    return ", ".join(f"{k}: {'-' if share is None else f'{share:.3f}'}" for k, share in enumerate(shares, start=1))


def shown_length(length: float | None) -> str:
    """Return an acceptance length with three decimals, or `-` without verify passes."""
    return "-" if length is None else f"{length:.3f}"


def _roundings(export: Export) -> str:
    """Return table rows of the tensors with the largest rounding errors."""
    worst = sorted(export.errors.items(), key=lambda item: -item[1].absolute)[:WORST]
    return "\n".join(f"| `{name}` | {error.absolute:.3g} | {error.relative:.3g} |" for name, error in worst)


def serving_notes(target: ExportTarget, samples: bool) -> list[str]:
    """Return what a server does differently from this project's measurements, and the switch if there is one."""
    server = SERVERS.get(target)
    return [] if server is None else [sampling_note(server, samples), f"{server.name} {server.first_position}."]


def _metadata(export: Export, name: str, shown: list[int]) -> str:
    """Return the Hub's front matter: base model, licence and the acceptance lengths that were measured."""
    measured = export.acceptance
    results = (
        None
        if measured is None
        else [
            EvalResult(
                task_type="text-generation",
                dataset_type="prompts",
                dataset_name=f"{measured.prompts} prompts, continued by the model at {measured.policy}",
                metric_type="acceptance_length",
                metric_name=f"tokens a pass at K={k}",
                metric_value=round(length, 4),
            )
            for k in shown
            if (length := measured.after[k]) is not None
        ]
    )
    data: Any = ModelCardData(
        base_model=export.origin.base_model,
        license=export.origin.license,
        library_name="mtptrain",
        tags=TAGS,
        model_name=name,
        eval_results=results,
    )
    return str(data.to_yaml())


def _acceptance(export: Export, shown: list[int]) -> str:
    """Return the card's section on acceptance."""
    measured = export.acceptance
    if measured is None:
        return NOT_MEASURED
    return ACCEPTANCE.format(
        verdict=verdict(measured, export.draft_length.served),
        policy=measured.policy,
        prompts=measured.prompts,
        lengths=_lengths(measured, shown),
        further="".join(f"\n{line}\n" for line in further_figures(export.target, measured, shown)),
        positions=_positions(measured, shown),
    )


def model_card(head: HeadIdentity, export: Export, folder: Path, source: Path) -> str:
    """Return the README.md of an exported folder.

    Args:
        head: identity of the trained head.
        export: facts of the export.
        folder: final name of the export's folder.
        source: folder of the backbone.
    """
    measured, served = export.acceptance, export.draft_length.served
    shown = shown_lengths(export.target, head.depth, list(measured.before)) if measured else []
    return CARD.format(
        metadata=_metadata(export, folder.name, shown),
        record=EXPORT_MANIFEST,
        facts=_facts(head, export),
        acceptance=_acceptance(export, shown),
        command=serve_command(export.target, export.form, folder, source, served, export.samples),
        notes="\n\n".join(serving_notes(export.target, export.samples)),
        warnings="\n".join(f"- {line}" for line in export.warnings or ["none"]),
        roundings=_roundings(export),
    )
