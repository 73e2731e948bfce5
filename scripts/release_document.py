"""Write docs/release.md, the table of released tensors: `python scripts/release_document.py > docs/release.md`."""

from __future__ import annotations

import textwrap

from transformers import DeepseekV4Config

from mtptrain.backbone.build import preset_config
from mtptrain.release.names import Row, release_table


def table_markdown(config: DeepseekV4Config) -> str:
    """Return the tensors of one released module as a Markdown table; one row stands for all experts."""
    table = release_table(config)
    lines = ["| released, below `mtp.D.` | ours, below `mtp.D.` | shape | dtype |", "|---|---|---|---|"]
    for row in table:
        if row.expert is None or row.expert == 0:
            released = row.released.replace("experts.0.", "experts.E.")
            ours = "scales of the tensor above" if row.is_scale else f"`{row.ours}`{_expert_part(row)}"
            packed = ", packed FP4" if row.scale == "fp4" and not row.is_scale else ""
            dtype = f"{str(row.dtype).removeprefix('torch.')}{packed}"
            lines.append(f"| `{released}` | {ours} | {list(row.shape)} | {dtype} |")
    count = f"{len(table)} tensors a module, E from 0 to {config.n_routed_experts - 1}."
    return "\n".join([count, "", *lines, ""])


def _expert_part(row: Row) -> str:
    """Return the part of our tensor that holds an expert's weight, empty outside the routed experts."""
    parts = {"w1": "[E], first half", "w2": "[E]", "w3": "[E], second half"}
    return "" if row.expert is None else parts[row.released.split(".")[-2]]


def document() -> str:
    """Return the text of docs/release.md."""
    about = (
        "One line for each tensor: its name and storage in a DeepSeek-V4 release, and its name in a checkpoint of this"
        " package. FP8 is e4m3 with one UE8M0 scale for 128 x 128 values; packed FP4 is e2m1, two columns to a byte,"
        " with the even one in the low nibble and one UE8M0 scale for 32 columns of a row. Releases named -Base store"
        " the experts as FP8 too, and every scale as float32, a power of two."
    )
    head = (
        "# Tensors of a released MTP module\n\n"
        "Written by `python scripts/release_document.py > docs/release.md`; do not edit.\n\n"
        f"{textwrap.fill(about, 120)}\n"
    )
    flash, pro = (table_markdown(preset_config(name)) for name in ("v4_flash", "v4_pro"))
    return f"{head}\n## DeepSeek-V4-Flash\n\n{flash}\n## DeepSeek-V4-Pro\n\n{pro}"


if __name__ == "__main__":
    print(document(), end="")
