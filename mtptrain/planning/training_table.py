"""A plan of training as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mtptrain.planning.table import new_table, sizes_in_words


def shares_table(title: str, unit: str, values: dict[str, float], scale: float) -> Table:
    """Values by name, the largest first, and their sum."""
    table = new_table(title, ["", unit, "share"])
    whole = sum(values.values())
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value / scale:.4g}", f"{value / whole:.0%}" if whole else "-")
    table.add_row("all", f"{whole / scale:.4g}", "", style="bold")
    return table


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits and how long it takes, in one sentence."""
    held = plan["memory"]
    return (
        f"{'fits' if held['fits'] else 'DOES NOT FIT'}: {held['bytes_a_gpu'] / 1e9:.4g} GB of "
        f"{held['memory_bytes_a_gpu'] / 1e9:.4g} GB a GPU; {plan['tokens'] / 1e9:.4g} B tokens take "
        f"{plan['hours']:.3g} hours at {plan['tokens_per_second']:.4g} tokens/s"
    )


def load_in_words(plan: dict[str, Any]) -> str:
    """Hardware, engine and batch in one line."""
    hardware, load = plan["hardware"], plan["training"]
    return (
        f"{hardware['num_gpus']} x {hardware['name']}; ZeRO stage {load['zero_stage']}, backbone "
        f"{load['placement']} in {load['backbone']}, heads in {load['heads']}; a GPU takes {load['rows']} x "
        f"{load['row_length']} tokens, {load['micro_batches']} times a step, {load['steps']} draft steps"
    )


def print_training_plan(plan: dict[str, Any], console: Console) -> None:
    """Verdict, memory by kind of tensor, and FLOPs, communication and seconds of a step."""
    held, step, cache = plan["memory"], plan["step"], plan["stream_cache"]
    console.print(verdict(plan), style="bold", highlight=False)
    console.print(sizes_in_words(plan["model"]), highlight=False)
    console.print(load_in_words(plan), highlight=False)
    console.print(shares_table("Memory of a GPU", "GB", held["gpu"], 1e9))
    if held["cpu"]:
        console.print(shares_table("A process's share in the CPU's memory", "GB", held["cpu"], 1e9))
    console.print(shares_table(f"A step of {step['tokens']} tokens, all GPUs", "TFLOP", step["flops"], 1e12))
    if step["sent_bytes_a_gpu"]:
        console.print(shares_table("Sent by a GPU in a step", "GB", step["sent_bytes_a_gpu"], 1e9))
    console.print(shares_table("Time of a step", "seconds", step["seconds"], 1))
    console.print(
        f"A stream cache of these tokens takes {cache['bytes'] / 1e12:.4g} TB, {cache['bytes_a_token'] / 1024:g} KiB a "
        "token in bf16.",
        highlight=False,
    )
    console.print(
        "Estimates until measured: products at the hardware's ceiling, nothing overlaps. See docs/plan.md.",
        highlight=False,
    )
