"""A plan of speculative decoding as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mtptrain.planning.table import new_table, sizes_in_words


def verdict(plan: dict[str, Any]) -> str:
    """The best K in one sentence."""
    best, rows = plan["best_draft_length"], plan["draft_lengths"]
    if best == 0:
        return "no draft pays at this acceptance: every K from 1 to 8 is slower than plain decoding"
    row = rows[best]
    return (
        f"best: K={best}, {row['speedup']:.2f}x at {row['acceptance_length']:.2f} tokens a verify pass "
        f"({row['tokens_per_second']:.0f} tokens/s over all rows)"
    )


def draft_length_table(plan: dict[str, Any]) -> Table:
    """Gain and cost for every K."""
    headers = ["K", "tok/pass", "experts", "verify ms", "draft ms", "speed-up", "break-even"]
    table = new_table("What K drafts gain", headers)
    for row in plan["draft_lengths"]:
        draft, even = row["draft"], row["break_even"]
        table.add_row(
            str(row["draft_length"]),
            f"{row['acceptance_length']:.2f}",
            f"{row['verify']['experts']:.1f}",
            f"{1e3 * row['verify']['seconds']:.3f}",
            "-" if draft is None else f"{1e3 * draft['seconds']:.3f}",
            f"{row['speedup']:.2f}x",
            "-" if draft is None else "never" if even is None else f"{even:.2f}",
            style="bold" if row["draft_length"] == plan["best_draft_length"] else None,
        )
    return table


def work_table(title: str, cost: dict[str, Any]) -> Table:
    """The parts of one pass, the slowest first."""
    table = new_table(title, ["part", "GB", "GFLOP", "ms", "share"])
    for name, part in sorted(cost["parts"].items(), key=lambda item: -item[1]["seconds"]):
        table.add_row(*_figures(name, part, cost["seconds"]))
    table.add_row(*_figures("all", cost, cost["seconds"]), style="bold")
    return table


def _figures(name: str, cost: dict[str, Any], whole: float) -> list[str]:
    return [
        name,
        f"{cost['bytes'] / 1e9:.4g}",
        f"{cost['flops'] / 1e9:.4g}",
        f"{1e3 * cost['seconds']:.4f}",
        f"{cost['seconds'] / whole:.0%}",
    ]


def print_decoding_plan(plan: dict[str, Any], console: Console) -> None:
    """Verdict, assumptions, gain by K, and the work of a plain pass, the best verify pass and a draft step."""
    console.print(verdict(plan), style="bold", highlight=False)
    for line in (sizes_in_words(plan["model"]), _describe_load(plan), _describe_profile(plan["acceptance"])):
        console.print(line, highlight=False)
    console.print(draft_length_table(plan))
    rows = plan["draft_lengths"]
    shown = plan["best_draft_length"] or 1
    console.print(work_table("A plain pass, t(1)", rows[0]["verify"]))
    console.print(work_table(f"A verify pass, t({shown + 1})", rows[shown]["verify"]))
    console.print(work_table("A draft step after the first", rows[shown]["draft"]["later_step"]))
    console.print(
        "Estimates: every part at the hardware's ceiling, one after the other. See docs/plan.md.", highlight=False
    )


def _describe_load(plan: dict[str, Any]) -> str:
    held, hardware, load = plan["memory"], plan["hardware"], plan["load"]
    gigabytes = {key: f"{held[f'{key}_bytes_a_gpu'] / 1e9:.3g} GB" for key in ("weights", "cache", "memory")}
    return (
        f"{hardware['num_gpus']} x {hardware['name']}, {load['weights']} weights, {load['cache']} keys, batch "
        f"{load['batch']}, context {load['context']}; a GPU of {gigabytes['memory']} holds {gigabytes['weights']} of "
        f"weights and {gigabytes['cache']} of keys" + ("" if held["fits"] else ": THAT DOES NOT FIT")
    )


def _describe_profile(acceptance: dict[str, Any]) -> str:
    shares = ", ".join(f"{share:.2f}" for share in acceptance["conditional"])
    return f"acceptance by position, {acceptance['source']}: {shares}; later positions repeat the last"
