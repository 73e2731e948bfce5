"""Heads against each other on the same traces: paired gains, and the verdict in words."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mtptrain.data.prompts import Prompt
from mtptrain.evaluation.counts import Counts
from mtptrain.evaluation.metrics import domain_rows, paired_gain, paired_position_gain

Replayed = dict[int, list[Counts]]  # counts of every prompt, by draft length


def compare_heads(names: tuple[str, str], base: Replayed, other: Replayed, prompts: list[Prompt]) -> dict[str, Any]:
    """Everything that tells whether `other` accepts more than `base`.

    Args:
        names: of base and other.
        base: its counts on the traces.
        other: its counts on the same traces.
        prompts: of the traces.

    Returns:
        `base`, `other`; over all prompts the fields of `compare_prompts`; `domains`: the same for each; `worse_on`:
        domains where other is worse; `verdict`: about all prompts and these domains.
    """
    pooled = compare_prompts(names, base, other, prompts)
    domains = {
        domain: compare_prompts(names, _take(base, rows), _take(other, rows), [prompts[i] for i in rows])
        for domain, rows in domain_rows([prompt.domain for prompt in prompts]).items()
    }
    longest = str(max(base))
    worse = [domain for domain, found in domains.items() if found["gain"][longest]["interval"][1] < 0]
    if worse and len(domains) > 1:
        pooled["verdict"] += f"; WORSE on {', '.join(worse)}"
    return {"base": names[0], "other": names[1], **pooled, "domains": domains, "worse_on": worse}


def compare_prompts(names: tuple[str, str], base: Replayed, other: Replayed, prompts: list[Prompt]) -> dict[str, Any]:
    """`prompts`, their number; `gain` by draft length; `gain_by_position` and `verdict` at the longest one."""
    groups, longest = [prompt.group for prompt in prompts], max(base)
    gain = {str(k): paired_gain(base[k], other[k], groups) for k in base}
    return {
        "prompts": len(prompts),
        "gain": gain,
        "gain_by_position": paired_position_gain(base[longest], other[longest], groups),
        "verdict": verdict(names, gain[str(longest)], longest),
    }


def _take(replayed: Replayed, rows: list[int]) -> Replayed:
    return {k: [counts[i] for i in rows] for k, counts in replayed.items()}


def verdict(names: tuple[str, str], gain: dict[str, Any], draft_length: int) -> str:
    """One sentence about the gain at one draft length."""
    base, other = names
    low, high = gain["interval"]
    if low > 0:
        return f"{other} accepts {gain['gain']:.2f} more tokens a pass than {base} ({low:.2f} to {high:.2f})"
    if high < 0:
        return f"{other} accepts {-gain['gain']:.2f} fewer tokens a pass than {base} ({-high:.2f} to {-low:.2f})"
    return (
        f"no evidence that {other} and {base} differ: {gain['gain']:+.2f} tokens a pass ({low:+.2f} to {high:+.2f}) at "
        f"K={draft_length}; these prompts would have shown {gain['detectable']:.2f}"
    )


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """The verdict, the gain by draft length and by position, then a line a domain where there are several."""
    console.print(comparison["verdict"], style="bold", highlight=False)
    table = Table("K or k", "gain, tokens a pass at K", "would have shown", "gain in acceptance at k", box=None)
    for k, gain in comparison["gain"].items():
        at_position = comparison["gain_by_position"][int(k) - 1]
        shown = "-" if at_position is None else _with_interval(at_position)
        table.add_row(k, _with_interval(gain), f"{gain['detectable']:.2f}", shown)
    console.print(table, highlight=False)
    if len(comparison["domains"]) > 1:
        for domain, found in comparison["domains"].items():
            style = "red" if domain in comparison["worse_on"] else None
            console.print(f"{domain} ({found['prompts']} prompts): {found['verdict']}", style=style, highlight=False)


def _with_interval(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{gain['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
