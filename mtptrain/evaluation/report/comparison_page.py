"""A comparison of heads on the terminal and as an HTML page, the verdict first."""

# K draft length

from __future__ import annotations

from pathlib import Path
from statistics import stdev

from rich.console import Console
from rich.table import Table

from mtptrain.evaluation.comparison_result import NO_PASSES, ComparedHead, Comparison, HeadComparison
from mtptrain.evaluation.head_result import Gain, chosen_text
from mtptrain.evaluation.report.comparison_plots import comparison_figures
from mtptrain.evaluation.report.comparison_tables import (
    DETECTABLE,
    describe_head,
    difference_table,
    domain_gain_table,
    gain_table,
    position_gain_table,
    run_table,
)
from mtptrain.evaluation.report.headline import Headline, policy_text, prompts_text, seen_text
from mtptrain.evaluation.report.tables import print_grid
from mtptrain.evaluation.report.template import captioned, origin_facts, sentence, write_page
from mtptrain.run.tables import print_sentence, print_table

COMPARISON_PAGE = "comparison.html"


def verdict_kind(comparison: HeadComparison, draft_length: int) -> Headline:
    """Return whether a setting gains, loses or shows no difference at the longest K; a domain that loses counts."""
    gain = comparison.gain[draft_length]
    if gain is not None and gain.is_clear_loss:
        return Headline.loss
    return Headline.gain if gain is not None and gain.is_clear and not comparison.worse_on else Headline.unclear


def comparison_headline(comparison: Comparison) -> tuple[Headline, str]:
    """Return the kind and the text of the headline: the verdict or, of several, how many settings gain."""
    kinds = [verdict_kind(one, comparison.draft_length) for one in comparison.comparisons]
    if len(kinds) == 1:
        return kinds[0], comparison.comparisons[0].verdict
    gains, losses = kinds.count(Headline.gain), kinds.count(Headline.loss)
    text = f"{gains} of {len(kinds)} settings accept more tokens a pass than {comparison.heads[0].name}"
    text += f", and {losses} fewer" if losses else ""
    best = Headline.loss if losses and not gains else Headline.unclear
    return Headline.gain if gains == len(kinds) else best, f"{text}, at K={comparison.draft_length}"


def comparison_notes(comparison: Comparison) -> list[str]:
    """Return a sentence for each head that was trained or chosen on some of the prompts."""
    notes = []
    for head, run in ((one, run) for one in comparison.heads for run in one.runs):
        name = head.name if len(head.runs) == 1 else run.checkpoint
        if run.seen_prompts is not None and run.seen_prompts.seen:
            notes.append(seen_text(name, run.seen_prompts))
        notes += [text] if (text := chosen_text(name, run.chosen_on)) else []
    return notes


def write_comparison_page(comparison: Comparison, path: Path) -> None:
    """Write the comparison as an HTML file, atomically.

    Args:
        comparison: the result.
        path: the file; its folder is made if it is missing.
    """
    kind, headline = comparison_headline(comparison)
    verdicts = [
        (verdict_kind(one, comparison.draft_length).value, sentence(one.verdict)) for one in comparison.comparisons
    ]
    content = {
        "title": f"mtptrain comparison on {comparison.backbone.name}",
        "kind": kind.value,
        "headline": sentence(headline),
        "verdicts": verdicts if len(verdicts) > 1 else [],
        "notes": [sentence(note) for note in comparison_notes(comparison)],
        "heads": {head.letter: describe_head(head) for head in comparison.heads},
        "gains": gain_table(comparison),
        "domains": domain_gain_table(comparison),
        "positions": position_gain_table(comparison),
        "runs": run_table(comparison),
        "differences": difference_table(comparison),
        "figures": captioned(comparison_figures(comparison)),
        "provenance": _provenance(comparison),
    }
    write_page("comparison.html", content, path)


def _provenance(comparison: Comparison) -> dict[str, str]:
    backbone = comparison.backbone
    return {
        **origin_facts(comparison.provenance),
        "Backbone": f"{backbone.name}, held-out loss {backbone.heldout_nats_per_token:.3f} nats/token, "
        f"{backbone.heldout_bits_per_byte:.3f} bits/byte, fingerprint {backbone.fingerprint}",
        "Prompts": prompts_text(comparison.prompts),
        "Policy": policy_text(comparison.policy),
    }


def print_result(comparison: Comparison, console: Console) -> None:
    """Print a sentence for each setting, every comparison, and the tables by domain and of settings."""
    lead = f"{comparison.prompts.count} prompts, {policy_text(comparison.policy)}"
    print_sentence(console, lead)
    for head in comparison.heads:
        print_sentence(console, head_sentence(head, comparison.draft_length))
    for one in comparison.comparisons:
        print_comparison(one, console)
    note = f"Would have shown: {DETECTABLE}. Gain in acceptance at k: of drafts of {comparison.draft_length} tokens"
    note += "; -: too few reached k."
    console.print(note, highlight=False, markup=False)
    for grid in (domain_gain_table(comparison), difference_table(comparison)):
        if grid is not None:
            print_grid(grid, console)


def head_sentence(head: ComparedHead, draft_length: int) -> str:
    """Return the acceptance length of a setting at one draft length, as one sentence; of several runs, their mean."""
    measured = head.replay[draft_length]
    if measured.acceptance_length is None or measured.interval is None:
        return f"{head.name}: {NO_PASSES}"
    low, high = measured.interval
    lead = f"{head.name}: {measured.acceptance_length:.3f} tokens a pass at K={draft_length}"
    if len(head.runs) == 1:
        return f"{lead} ({low:.3f} to {high:.3f} over prompts)"
    lengths = [one for run in head.runs if (one := run.acceptance_length[draft_length]) is not None]
    shown = ", ".join(f"{length:.3f}" for length in lengths)
    return (
        f"{lead}, mean of {len(head.runs)} runs ({low:.3f} to {high:.3f} over runs and prompts); runs {shown}, "
        f"standard deviation {stdev(lengths) if len(lengths) > 1 else 0.0:.3f}"
    )


def print_comparison(comparison: HeadComparison, console: Console) -> None:
    """Print the verdict, the gain by draft length and by position, and a line for each of several domains."""
    console.print(comparison.verdict, style="bold", highlight=False, markup=False)
    table = Table("K or k", "gain, tokens a pass at K", "would have shown", "gain in acceptance at k", box=None)
    for k, gain in comparison.gain.items():
        at_position = comparison.gain_by_position[k - 1]
        detectable = "-" if gain is None else f"{gain.detectable:.2f}"
        table.add_row(str(k), _with_interval(gain), detectable, _with_interval(at_position))
    print_table(console, table)
    if len(comparison.domains) > 1:
        for domain, gains in comparison.domains.items():
            style = "red" if domain in comparison.worse_on else None
            line = f"({gains.prompts} prompts): {gains.verdict}" if gains else f"({NO_PASSES})"
            console.print(f"{domain} {line}", style=style, highlight=False, markup=False)


def _with_interval(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    low, high = gain.interval
    return f"{gain.gain:+.3f} ({low:+.3f} to {high:+.3f})"
