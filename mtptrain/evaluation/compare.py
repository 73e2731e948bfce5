"""Comparison of two heads on the same traces: paired gains, and a verdict in words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mtptrain.evaluation.comparison_result import HeadComparison, PromptGains
from mtptrain.evaluation.head_result import Gain
from mtptrain.evaluation.metrics import (
    domain_rows,
    have_passes,
    paired_gain,
    paired_gain_by_domain,
    paired_position_gain,
)
from mtptrain.replay.replay import Counts
from mtptrain.traces.prompts import Prompt

CountsByLength = dict[int, list[Counts]]  # counts of every prompt, by draft length
NO_PASSES = "no verify pass: every text ends at its first token"


def compare_heads(
    names: tuple[str, str], base: CountsByLength, other: CountsByLength, prompts: list[Prompt]
) -> HeadComparison:
    """Return the gains of `other` over `base`, on all prompts and by domain.

    Args:
        names: of base and other.
        base: counts of the base head on the traces.
        other: counts of the other head on the same traces.
        prompts: of the traces.
    """
    pooled = compare_prompts(names, base, other, prompts)
    domains = {
        domain: _compare_domain(names, _take(base, rows), _take(other, rows), [prompts[i] for i in rows])
        for domain, rows in domain_rows([prompt.domain for prompt in prompts]).items()
    }
    at_longest = {domain: gains and gains.gain[max(base)] for domain, gains in domains.items()}
    worse = [domain for domain, gain in at_longest.items() if gain and gain.is_clear_loss]
    warning = f"; WORSE on {', '.join(worse)}" if worse and len(domains) > 1 else ""
    return HeadComparison(
        base=names[0],
        other=names[1],
        prompts=pooled.prompts,
        gain=pooled.gain,
        gain_by_position=pooled.gain_by_position,
        verdict=pooled.verdict + warning,
        domains=domains,
        worse_on=worse,
    )


def compare_prompts(
    names: tuple[str, str], base: CountsByLength, other: CountsByLength, prompts: list[Prompt]
) -> PromptGains:
    """Return the gains of `other` on some prompts."""
    groups, longest = [prompt.group for prompt in prompts], max(base)
    gain = {k: paired_gain(base[k], other[k], groups) for k in base}
    return PromptGains(
        prompts=len(prompts),
        gain=gain,
        gain_by_position=paired_position_gain(base[longest], other[longest], groups),
        verdict=gain_sentence(names, gain[longest], longest),
    )


def _compare_domain(
    names: tuple[str, str], base: CountsByLength, other: CountsByLength, prompts: list[Prompt]
) -> PromptGains | None:
    """Return `compare_prompts`; None if no text of the domain needed a pass."""
    return compare_prompts(names, base, other, prompts) if have_passes(base[max(base)]) else None


def _take(counts: CountsByLength, rows: list[int]) -> CountsByLength:
    return {k: [of_prompts[i] for i in rows] for k, of_prompts in counts.items()}


def gain_sentence(names: tuple[str, str], gain: Gain | None, draft_length: int) -> str:
    """Return one sentence about the gain at one draft length."""
    if gain is None:
        return NO_PASSES
    base, other = names
    low, high = gain.interval
    if gain.is_clear:
        return f"{other} accepts {gain.gain:.2f} more tokens a pass than {base} ({low:.2f} to {high:.2f})"
    if gain.is_clear_loss:
        return f"{other} accepts {-gain.gain:.2f} fewer tokens a pass than {base} ({-high:.2f} to {-low:.2f})"
    return (
        f"no evidence that {other} and {base} differ: {gain.gain:+.2f} tokens a pass ({low:+.2f} to {high:+.2f}) at "
        f"K={draft_length}; these prompts would have shown {gain.detectable:.2f}"
    )


def print_comparison(comparison: HeadComparison, console: Console) -> None:
    """Print the verdict, the gain by draft length and by position, and a line for each of several domains."""
    console.print(comparison.verdict, style="bold", highlight=False)
    table = Table("K or k", "gain, tokens a pass at K", "would have shown", "gain in acceptance at k", box=None)
    for k, gain in comparison.gain.items():
        at_position = comparison.gain_by_position[k - 1]
        detectable = "-" if gain is None else f"{gain.detectable:.2f}"
        table.add_row(str(k), _with_interval(gain), detectable, _with_interval(at_position))
    console.print(table, highlight=False)
    if len(comparison.domains) > 1:
        for domain, gains in comparison.domains.items():
            style = "red" if domain in comparison.worse_on else None
            line = f"({gains.prompts} prompts): {gains.verdict}" if gains else f"({NO_PASSES})"
            console.print(f"{domain} {line}", style=style, highlight=False)


def _with_interval(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    low, high = gain.interval
    return f"{gain.gain:+.3f} ({low:+.3f} to {high:+.3f})"


def compare_with_stock(
    replays: dict[str, CountsByLength], prompts: list[Prompt]
) -> tuple[dict[int, Gain | None] | None, dict[str, Gain | None] | None]:
    """Return the gain of the trained over the stock head by K, and by domain at the longest K; None without both."""
    if not {"stock", "trained"} <= set(replays):
        return None, None
    stock, trained = replays["stock"], replays["trained"]
    groups, longest = [prompt.group for prompt in prompts], max(stock)
    gain = {k: paired_gain(stock[k], trained[k], groups) for k in stock}
    domains = [prompt.domain for prompt in prompts]
    return gain, paired_gain_by_domain(stock[longest], trained[longest], groups, domains)
