"""The result of `+recipe=measure_server`: acceptance as served beside replay's prediction."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mtptrain.evaluation.compare import gain_sentence
from mtptrain.evaluation.head_result import Acceptance, Gain
from mtptrain.evaluation.metrics import paired_gain, summarize
from mtptrain.evaluation.result import PolicyResult, PromptsResult
from mtptrain.replay.replay import Counts
from mtptrain.run.provenance import Provenance
from mtptrain.run.tables import print_table

SERVER_FILE, SCHEMA = "server.json", 1
NAMES = ("the prediction", "the server")


@dataclass(frozen=True, slots=True)
class ServerMeasurement:
    """Acceptance as served and as predicted on the same prompts.

    Attributes:
        schema: of this file.
        provenance: of the run.
        url, server, model: address, `vLLM` or `SGLang`, and the model's name there.
        checkpoint: the head of the prediction.
        policy: how tokens were drawn.
        prompts: prompts of the measurement.
        draft_length: K of the server.
        served: from the server's counters; SGLang has none by position.
        predicted: from replay.
        difference: served minus predicted acceptance length; None without passes.
        same_text: share of texts that equal the backbone's; None for sampled ones.
        verdict: for people to read.
    """

    schema: int
    provenance: Provenance
    url: str
    server: str
    model: str
    checkpoint: str
    policy: PolicyResult
    prompts: PromptsResult
    draft_length: int
    served: Acceptance
    predicted: Acceptance
    difference: Gain | None
    same_text: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """Both sides' acceptance, the difference, and a verdict."""

    served: Acceptance
    predicted: Acceptance
    difference: Gain | None
    verdict: str


def compare_counts(served: list[Counts], predicted: list[Counts], groups: list[int], draft_length: int) -> Agreement:
    """Return served and predicted acceptance at one K, with a paired interval over groups of prompts."""
    difference = paired_gain(predicted, served, groups)
    verdict = gain_sentence(NAMES, difference, draft_length)
    if difference is not None and difference.is_clear_loss:
        verdict = f"LESS THAN PREDICTED: {verdict}; docs/export.md lists what serving changes"
    ours, theirs = (summarize(counts, groups, draft_length) for counts in (predicted, served))
    return Agreement(served=theirs, predicted=ours, difference=difference, verdict=verdict)


def print_measurement(result: ServerMeasurement, console: Console) -> None:
    """Print the verdict and the table of both sides."""
    console.print(result.verdict, style="bold", highlight=False)
    table = Table(f"K={result.draft_length}", f"{result.server}, served", "replay, predicted", box=None)
    served, predicted = result.served, result.predicted
    table.add_row("tokens a pass", _with_interval(served), _with_interval(predicted))
    table.add_row("verify passes", f"{served.passes:g}", f"{predicted.passes:.1f}")
    table.add_row("tokens", f"{served.emitted:g}", f"{predicted.emitted:g}")
    for k, share in enumerate(predicted.conditional):
        measured = served.conditional[k] if k < len(served.conditional) else None
        table.add_row(f"kept at position {k + 1}", _share(measured), _share(share))
    print_table(console, table)
    if result.same_text is not None:
        console.print(f"{result.same_text:.0%} of the texts equal the backbone's own", highlight=False)


def _with_interval(side: Acceptance) -> str:
    if side.acceptance_length is None or side.interval is None:
        return "-"
    return f"{side.acceptance_length:.3f} ({side.interval[0]:.3f} to {side.interval[1]:.3f})"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
