"""An evaluation in a line and as a small table, for an interactive session."""

# K draft length

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mtptrain.evaluation.head_result import Acceptance, Gain, span

if TYPE_CHECKING:
    from mtptrain.evaluation.result import Evaluation

MISSING = "-"


def describe(evaluation: Evaluation) -> str:
    """Return the acceptance lengths at the longest K and the verdict of the certificate, in one line."""
    longest = evaluation.draft_length
    lengths = [(head.name, head.replay[longest].acceptance_length) for head in evaluation.heads]
    figures = ", ".join(f"{name} {MISSING if length is None else f'{length:.2f}'}" for name, length in lengths)
    return f"<Evaluation at K={longest}: {figures} tokens a pass; certificate {_verdict(evaluation)}>"


def html_table(evaluation: Evaluation) -> str:
    """Return the acceptance length of every head by K, and the gain of the trained head, as an HTML table."""
    names = [escape(head.name) for head in evaluation.heads] + (["gain"] if evaluation.gain else [])
    head = "".join(f"<th>{name}</th>" for name in ["K", *names])
    rows = []
    for k in evaluation.draft_lengths:
        cells = [_length(one.replay[k]) for one in evaluation.heads]
        cells += [_gain(evaluation.gain[k])] if evaluation.gain else []
        rows.append("".join(f"<td>{cell}</td>" for cell in [str(k), *cells]))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    interval = evaluation.prompts.interval_text
    rule = f"<p>tokens a pass, {interval}; certificate {_verdict(evaluation)}</p>"
    return f"<table><tr>{head}</tr>{body}</table>{rule}"


def _verdict(evaluation: Evaluation) -> str:
    return "passed" if evaluation.certificate.passed else "FAILED"


def _length(measured: Acceptance) -> str:
    if measured.acceptance_length is None or measured.interval is None:
        return MISSING
    return f"{measured.acceptance_length:.2f} ({span(measured.interval)})"


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return MISSING
    return f"{gain.gain:+.2f} ({span(gain.interval, signed=True)})"
