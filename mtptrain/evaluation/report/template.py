"""Rendering of the templates in this folder: self-contained HTML files in one style."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mtptrain.run.storage import write_text

STYLE = "page.css"


def write_page(template: str, content: Mapping[str, object], path: Path) -> None:
    """Write a page, atomically.

    Args:
        template: file name of its template.
        content: values of the names in it; `style` is added.
        path: the file; its folder is made if it is missing.
    """
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.get_template(template).render(content, style=Markup(_read(STYLE))))


def _read(name: str) -> str:
    return files("mtptrain.evaluation.report").joinpath(name).read_text(encoding="utf-8")
