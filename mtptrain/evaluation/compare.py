"""Heads against each other on the same traces: paired gains, and the verdict in words."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mtptrain.decoding.records import VerifyPass
from mtptrain.evaluation.metrics import paired_gain, paired_position_gain

Replayed = dict[int, list[list[VerifyPass]]]  # passes of every prompt, by draft length


def compare_heads(names: tuple[str, str], base: Replayed, other: Replayed) -> dict[str, Any]:
    """Everything that tells whether `other` accepts more than `base`.

    Args:
        names: of base and other.
        base: its passes on the traces.
        other: its passes on the same traces.

    Returns:
        `base`, `other`, `gain` by draft length, `gain_by_position` at the longest one, and the `verdict` there.
    """
    longest = max(base)
    gain = {str(k): paired_gain(base[k], other[k]) for k in base}
    return {
        "base": names[0],
        "other": names[1],
        "gain": gain,
        "gain_by_position": paired_position_gain(base[longest], other[longest], longest),
        "verdict": verdict(names, gain[str(longest)], longest),
    }


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
    """The verdict, then the gain by draft length and by position."""
    console.print(comparison["verdict"], style="bold", highlight=False)
    table = Table("K or k", "gain, tokens a pass at K", "would have shown", "gain in acceptance at k", box=None)
    for k, gain in comparison["gain"].items():
        at_position = comparison["gain_by_position"][int(k) - 1]
        shown = "-" if at_position is None else _with_interval(at_position)
        table.add_row(k, _with_interval(gain), f"{gain['detectable']:.2f}", shown)
    console.print(table, highlight=False)


def _with_interval(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{gain['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
