"""What the tables of both plans share."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def new_table(title: str, headers: list[str]) -> Table:
    """An empty table; the first column holds names."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    return table


def sizes_in_words(model: dict[str, Any]) -> str:
    """Parameters of the model, of a token and of a module, in one line."""
    billions = {key: f"{model[key] / 1e9:.4g} B" for key in ("parameters", "active_parameters", "module_parameters")}
    return (
        f"{model['name']}: {billions['parameters']} parameters, {billions['active_parameters']} a token; "
        f"MTP module {billions['module_parameters']}"
    )
