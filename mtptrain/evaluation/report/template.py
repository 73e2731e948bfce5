"""Rendering of the templates in this folder, self-contained HTML files in one style, and texts that pages share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mtptrain.run.provenance import Provenance
from mtptrain.run.storage import write_text

STYLE = "page.css"


def write_page(template: str, content: Mapping[str, object], path: Path) -> None:
    """Write a page, atomically.

    Args:
        template: file name of its template.
        content: values of the names in it; `style` is added.
        path: the file; its folder is made if it is missing.
    """
    write_text(path, _environment().get_template(template).render(content, style=Markup(_read(STYLE))))


@cache
def _environment() -> Environment:
    """Return the environment, which compiles each template once."""
    return Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def captioned(figures: Mapping[str, str | None]) -> list[tuple[str, Markup]]:
    """Return captions and SVG elements, which matplotlib has escaped; a figure without data is left out."""
    return [(caption, Markup(svg)) for caption, svg in figures.items() if svg]


def sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def origin_facts(origin: Provenance) -> dict[str, str]:
    """Return the origin of a result, name by name."""
    hardware = origin.hardware
    count = hardware.torch_threads
    threads = "" if count is None else f", {count} torch thread{'s' if count != 1 else ''}"
    return {
        "Command": shlex.join(origin.command),
        "Started": origin.started,
        "Commit": origin.git_commit or "not a git checkout",
        "Seed": str(origin.seed),
        "Processor": f"{hardware.processor}, {hardware.cores} cores{threads}",
        "GPUs": ", ".join(hardware.gpus) or "none",
        "Versions": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
    }


def _read(name: str) -> str:
    return files("mtptrain.evaluation.report").joinpath(name).read_text(encoding="utf-8")
