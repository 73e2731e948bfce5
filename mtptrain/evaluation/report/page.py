"""One self-contained HTML page of an evaluation: no script, no request, readable on a phone."""

from __future__ import annotations

import shlex
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from mtptrain.evaluation.report import plots
from mtptrain.evaluation.report.anatomy import (
    KINDS,
    breakdown_grids,
    domain_grid,
    share_grid,
    step_grid,
    threshold_grid,
)
from mtptrain.evaluation.report.table import (
    MISSING_VALUE,
    Cell,
    Grid,
    backbone_line,
    certificate_details,
    certificate_line,
    clock_verdict,
    draft_lengths,
    length_grid,
    outcome,
    position_grid,
    verdict,
)
from mtptrain.storage import write_text

# K draft length, k position in the draft from 1.

SHOWN_DETAILS = 100


def write_report(evaluation: dict[str, Any], path: Path) -> None:
    """Write the evaluation as an HTML file, atomically.

    Args:
        evaluation: content of evaluation.json.
        path: the file; its folder is made where it is missing.
    """
    package = files("mtptrain.evaluation.report")
    template = Template(package.joinpath("page.html").read_text(encoding="utf-8"))
    style = package.joinpath("page.css").read_text(encoding="utf-8")
    write_text(path, template.substitute(_fields(evaluation), style=style))


def _fields(evaluation: dict[str, Any]) -> dict[str, str]:
    """What the template's names stand for, as HTML."""
    passed = evaluation["certificate"]["passed"]
    word = "Certificate passed" if passed else "CERTIFICATE FAILED"
    return {
        "title": escape(f"mtptrain evaluation of {evaluation['backbone']['name']}"),
        "outcome": outcome(evaluation).value,
        "verdict": escape(_sentence(verdict(evaluation))),
        "clock": escape(_sentence(clock_verdict(evaluation))),
        "certificate": escape(f"{word}: {certificate_line(evaluation)}"),
        "certificate_class": "passed" if passed else "failed",
        "certificate_details": _certificate_details(evaluation),
        "lengths": _table(length_grid(evaluation)),
        "positions": _table(position_grid(evaluation)),
        "domains": _table(domains) if (domains := domain_grid(evaluation)) else "",
        "plots": _plots(evaluation),
        "steps": _table(step_grid(evaluation)) + _table(share_grid(evaluation)),
        "losses": _losses(evaluation),
        "thresholds": _table(threshold_grid(evaluation)),
        "samples": _samples(evaluation),
        "counts": _table(_passes_grid(evaluation)) + _table(_counts_grid(evaluation)),
        "provenance": _facts(_provenance(evaluation)),
    }


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _table(grid: Grid) -> str:
    """A grid as an HTML table in a box that scrolls by itself, with its note below."""
    headers = "".join(f'<th scope="col">{escape(header).replace(chr(10), "<br>")}</th>' for header in grid.headers)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0].value)}</th>{"".join(map(_table_cell, row[1:]))}</tr>' for row in grid.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(grid.title)}">'
        f"<table><thead><tr>{headers}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{escape(grid.note)}</p>'
    )


def _table_cell(cell: Cell) -> str:
    spread = f"<small>{escape(cell.spread)}</small>" if cell.spread else ""
    return f"<td>{escape(cell.value)}{spread}</td>"


def _figure(caption: str, svg: str | None) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" if svg else ""


def _plots(evaluation: dict[str, Any]) -> str:
    return (
        _figure("Acceptance length (95 % intervals)", plots.acceptance_length(evaluation))
        + _figure("Gain over stock (95 % intervals)", plots.gain(evaluation))
        + _figure("Speed-up (bars: quartiles, dots: batches)", plots.speedup(evaluation))
        + _figure("Speed-up by batch (medians)", plots.batch_speedup(evaluation))
        + _figure("Conditional acceptance by position", plots.acceptance_by_position(evaluation))
    )


def _losses(evaluation: dict[str, Any]) -> str:
    """Plots of losses, of acceptance by every kind and of calibration, then a folded table for each kind."""
    figures = (
        _figure("Where drafted tokens are lost", plots.losses(evaluation))
        + "".join(
            _figure(f"Acceptance by {title}", plots.acceptance_by(evaluation, kind)) for kind, title in KINDS.items()
        )
        + _figure("Confidence against acceptance", plots.calibration(evaluation))
    )
    errors = "; ".join(
        f"{head['name']} {head['calibration']['ece']:.3f}"
        for head in evaluation["heads"]
        if head["calibration"]["bins"]
    )
    note = f'<p class="note">Expected calibration error: {escape(errors)}.</p>'
    tables = "".join(
        f"<details><summary>{escape(grid.title)}</summary>{_table(grid)}</details>"
        for grid in breakdown_grids(evaluation)
    )
    return f'<div class="plots">{figures}</div>{note}{tables}'


def _samples(evaluation: dict[str, Any]) -> str:
    blocks = [
        f"<h3>{escape(head['name'])} head, K={sample['draft_length']}</h3><pre>{_pieces(sample)}</pre>"
        for head in evaluation["heads"]
        for sample in head["samples"]
    ]
    return "".join(blocks) or "<p>No samples were kept.</p>"


def _pieces(sample: dict[str, Any]) -> str:
    pieces = sample["pieces"]
    if not any(piece["kind"] == "prompt" for piece in pieces):
        pieces = [{"text": sample["prompt"], "kind": "prompt"}, *pieces]
    return "".join(map(_piece, pieces))


def _piece(piece: dict[str, str]) -> str:
    text, kind = escape(piece["text"]), escape(piece["kind"])
    if kind == "prompt":
        return f'<span class="prompt">{text}</span>'
    # A coloured line break would be invisible; one that was rejected breaks no line.
    line_break = "&#8629;" if kind == "rejected" else "&#8629;" + chr(10)
    return f'<mark class="{kind}">{text.replace(chr(10), line_break)}</mark>'


def _certificate_details(evaluation: dict[str, Any]) -> str:
    details = certificate_details(evaluation)
    if not details:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in details[:SHOWN_DETAILS])
    more = f"<p>and {len(details) - SHOWN_DETAILS} more in evaluation.json</p>" if len(details) > SHOWN_DETAILS else ""
    return f'<ul class="details">{items}</ul>{more}'


def _passes_grid(evaluation: dict[str, Any]) -> Grid:
    """Per K: passes, emitted tokens and acceptance length of the replay and of the real loop."""
    sides = [(head, side) for head in evaluation["heads"] for side in ("replay", "loop")]
    parts = ("passes", "emitted", "acceptance_length")
    headers = ["K", *(f"{head['name']}\n{side}\n{part.split('_')[-1]}" for head, side in sides for part in parts)]
    rows = []
    for length in draft_lengths(evaluation):
        found = [head[side].get(length, {}) for head, side in sides]
        rows.append([Cell(length), *(_count_cell(counts.get(part)) for counts in found for part in parts)])
    note = "Length: acceptance length. Replay: all prompts. Loop: real decoding of the timed prompts."
    return Grid("Passes of the replay and of the loop", headers, rows, note)


def _counts_grid(evaluation: dict[str, Any]) -> Grid:
    """Per position at the longest K: drafted, accepted, unconditional acceptance, held-out tokens."""
    length = draft_lengths(evaluation)[-1]
    columns: dict[str, list[Any]] = {}
    for head in evaluation["heads"]:
        replay = head["replay"][length]
        columns |= {f"{head['name']}\n{part}": replay[part] for part in ("drafted", "accepted", "unconditional")}
        columns[f"{head['name']}\nheld-out tokens"] = head["teacher_forced"]["tokens"]
    rows = [
        [
            Cell(str(position + 1)),
            *(_count_cell(values[position] if position < len(values) else None) for values in columns.values()),
        ]
        for position in range(max(map(len, columns.values())))
    ]
    note = f"Replay at K={length}. Held-out tokens: those behind alpha and top-1."
    return Grid("Counts by draft position", ["k", *columns], rows, note)


def _count_cell(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING_VALUE)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.3f}")


def _provenance(evaluation: dict[str, Any]) -> dict[str, str]:
    """Where the figures come from, name by name, as plain text."""
    origin, backbone, prompts = evaluation["provenance"], evaluation["backbone"], evaluation["prompts"]
    hardware = origin["hardware"]
    heads = {
        f"{head['name']} head": f"{head['checkpoint']} ({head['mode']}, depth {head['depth']}, "
        f"{head['parameters']:,} parameters)"
        for head in evaluation["heads"]
    }
    return {
        "Command": shlex.join(origin["command"]),
        "Started": origin["started"],
        "Commit": origin["git_commit"] or "not a git checkout",
        "Seed": str(origin["seed"]),
        "Processor": f"{hardware['processor']}, {hardware['cores']} cores, {hardware['torch_threads']} torch threads",
        "GPUs": ", ".join(hardware["gpus"]) or "none",
        "Versions": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
        "Backbone": f"{backbone_line(evaluation).removeprefix('backbone ')}; {backbone['parameters']:,} parameters, "
        f"fingerprint {backbone['fingerprint']}",
        **heads,
        "Prompts": f"{prompts['count']} {prompts['source']} prompts of {prompts['prompt_tokens']} tokens, "
        f"{prompts['new_tokens']} new tokens each",
        "Policy": ", ".join(f"{name} {value}" for name, value in evaluation["policy"].items() if value is not None),
        "Plain decoding": "; ".join(
            f"{rate:,.1f} tokens/s at batch {size}" for size, rate in evaluation["plain_tokens_per_second"].items()
        ),
    }


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'
