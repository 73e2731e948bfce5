"""Which wiring a head fits best, and what to say about it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.policy import Policy
from mtptrain.evaluation.compare import Replayed
from mtptrain.evaluation.drafts import draft_traces
from mtptrain.evaluation.metrics import paired_gain, summarize
from mtptrain.evaluation.replay import replay_all
from mtptrain.evaluation.trace import Trace
from mtptrain.evaluation.wiring import RIGHT, WIRINGS, Wiring
from mtptrain.mtp.stack import MtpStack

NO_HEAD = 1.05  # tokens a pass below which a head drafts nothing worth verifying


def replay_wiring(
    model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace], steps: int, wiring: Wiring
) -> Replayed:
    """Counts of greedy drafts under a wiring, by draft length; prompts of one length together."""
    counts: Replayed = {k: [] for k in range(1, steps + 1)}
    for length in sorted({len(trace.prompt.tokens) for trace in traces}):
        group = [trace for trace in traces if len(trace.prompt.tokens) == length]
        drafts = draft_traces(model, stack, group, steps, Policy(), wiring.build(model, length))
        for k, found in replay_all(drafts, Policy()).items():
            counts[k] += found
    return counts


@torch.inference_mode()
def measure_wirings(
    model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace], steps: int
) -> list[dict[str, Any]]:
    """Acceptance length at `steps` drafts under every wiring, with its paired difference from the right one."""
    ordered = sorted(traces, key=lambda trace: len(trace.prompt.tokens))
    groups = [trace.prompt.group for trace in ordered]
    rows, right = [], None
    for wiring in WIRINGS:
        counts = replay_wiring(model, stack, ordered, steps, wiring)[steps]
        right = counts if right is None else right
        figures = summarize(counts, groups)
        rows.append(
            {
                "wiring": wiring.name,
                "feeds": wiring.feeds,
                "acceptance_length": figures["acceptance_length"],
                "interval": figures["interval"],
                "against_right": paired_gain(right, counts, groups),
            }
        )
    return rows


def diagnose(tensors: dict[str, Any], wirings: list[dict[str, Any]] | None, controls: dict[str, Any]) -> dict[str, Any]:
    """The verdict in words.

    Args:
        tensors: of `examine_tensors`.
        wirings: of `measure_wirings`; None where the tensors do not make a head.
        controls: results with `passed`, by name.

    Returns:
        `healthy`; `best`, the wiring the head fits best, `right` unless another one is better beyond doubt; `verdict`,
        one sentence; `findings`, what is wrong and what to do.
    """
    kinds = {
        "missing": "are missing: export or convert the head again, no name may be dropped",
        "unexpected": "are unexpected: they belong to another model or naming; servers skip them without a word",
        "misshaped": "have another shape: the head belongs to another backbone",
        "non_finite": "hold NaN or infinity: go back to an earlier checkpoint and lower the learning rate",
        "zero": "are all zero: they were never filled",
    }
    findings = [
        f"{len(tensors[kind])} tensors {text}: {_listed(tensors[kind])}"
        for kind, text in kinds.items()
        if tensors[kind]
    ]
    if tensors["same_as_stock"] and len(tensors["same_as_stock"]) == tensors["expected"]:
        findings.append("Every tensor equals the stock head's: nothing was trained.")
    findings += [
        f"The control {name} failed: do not trust these numbers." for name, row in controls.items() if not row["passed"]
    ]
    best = None
    if wirings is not None:
        best, finding = _best_wiring(wirings)
        findings += [finding] if finding else []
    verdict = "nothing is wrong with this head: its tensors are sound and it fits the right wiring"
    if findings:
        fits = "" if best in (None, RIGHT) else f", which fits the wiring {best} best"
        verdict = f"something is wrong with this head{fits}; what it is and what to do:"
    return {"healthy": not findings, "best": best, "verdict": verdict, "findings": findings}


def _best_wiring(rows: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The wiring fitted best and what is wrong: the largest of the gains that are beyond doubt.

    Nine wirings are tried, so a gain must also reach 2.8 standard errors (`detectable`): 2.77 is Bonferroni's bound.
    """
    right = rows[0]["acceptance_length"]
    gains = [(row, row["against_right"]) for row in rows[1:]]
    better = [row for row, gain in gains if gain["interval"][0] > 0 and gain["gain"] >= gain["detectable"]]
    if better:
        row = max(better, key=lambda row: row["against_right"]["gain"])
        low, high = row["against_right"]["interval"]
        gain = row["against_right"]["gain"]
        remedy = next(wiring.remedy for wiring in WIRINGS if wiring.name == row["wiring"])
        return row["wiring"], (
            f"The head was trained with {row['feeds']}: fed so it accepts {gain:.2f} more tokens a pass "
            f"({low:.2f} to {high:.2f}) than as servers feed it. {remedy}"
        )
    if right < NO_HEAD:
        return RIGHT, (
            f"The head accepts almost nothing under any wiring ({right:.2f} tokens a pass): its weights are untrained, "
            "were not loaded, or belong to another backbone."
        )
    return RIGHT, None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
