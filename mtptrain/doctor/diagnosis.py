"""The diagnosis of a head: acceptance under every wiring, the faults, and their remedies in words."""

from __future__ import annotations

import torch
from transformers import DeepseekV4ForCausalLM

from mtptrain.decoding.policy import Policy
from mtptrain.doctor.result import Diagnosis, DoctorControls, TensorFaults, WiringResult
from mtptrain.doctor.wirings import RIGHT, WIRINGS, Wiring
from mtptrain.evaluation.certificate_result import Outcome
from mtptrain.evaluation.compare import CountsByLength
from mtptrain.evaluation.head_result import Gain
from mtptrain.evaluation.metrics import paired_gain, summarize
from mtptrain.mtp.stack import MtpStack
from mtptrain.release.problems import DSPARK
from mtptrain.replay.drafts import draft_traces
from mtptrain.replay.replay import replay_all
from mtptrain.run.progress import counted
from mtptrain.traces.file import Trace

NO_HEAD = 1.05  # tokens a pass below which a head drafts nothing worth verifying


def replay_wiring(
    model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace], steps: int, wiring: Wiring
) -> CountsByLength:
    """Return the counts of greedy drafts under a wiring, by draft length.

    Prompts of one length are replayed together, so the counts stand in the order of the traces only if the traces are
    sorted by the length of their prompts.
    """
    counts: CountsByLength = {k: [] for k in range(1, steps + 1)}
    for length in sorted({len(trace.prompt.tokens) for trace in traces}):
        group = [trace for trace in traces if len(trace.prompt.tokens) == length]
        drafts = draft_traces(model, stack, group, steps, Policy(), wiring.build(model, length))
        for k, of_group in replay_all(drafts, Policy()).items():
            counts[k] += of_group
    return counts


@torch.inference_mode()
def measure_wirings(
    model: DeepseekV4ForCausalLM, stack: MtpStack, traces: list[Trace], steps: int
) -> list[WiringResult]:
    """Return the acceptance at `steps` drafts under every wiring, the right one first."""
    ordered = sorted(traces, key=lambda trace: len(trace.prompt.tokens))
    groups = [trace.prompt.group for trace in ordered]
    counts = {
        wiring.name: replay_wiring(model, stack, ordered, steps, wiring)[steps]
        for wiring in counted("measuring the head under every wiring", WIRINGS)
    }

    def gain_over(base: str, name: str) -> Gain:
        gain = paired_gain(counts[base], counts[name], groups)
        assert gain is not None, "a recipe refuses traces without a verify pass"
        return gain

    against_right = {name: gain_over(RIGHT, name) for name in counts}
    best = best_wiring(against_right)
    rows = []
    for wiring in WIRINGS:
        figures = summarize(counts[wiring.name], groups)
        assert figures.acceptance_length is not None
        assert figures.interval is not None
        rows.append(
            WiringResult(
                wiring=wiring.name,
                feeds=wiring.feeds,
                acceptance_length=figures.acceptance_length,
                interval=figures.interval,
                against_right=against_right[wiring.name],
                against_best=gain_over(best, wiring.name),
            )
        )
    return rows


def best_wiring(against_right: dict[str, Gain]) -> str:
    """Return the wiring that a head fits best: the largest of the clear gains over the right one, or `right`.

    Nine wirings are tried, so a gain must also reach 2.8 standard errors (`detectable`): 2.77 is Bonferroni's bound.
    """
    better = {name: gain.gain for name, gain in against_right.items() if gain.is_clear and gain.gain >= gain.detectable}
    return max(better, key=lambda name: better[name]) if better else RIGHT


def diagnose(tensors: TensorFaults, wirings: list[WiringResult] | None, controls: DoctorControls | None) -> Diagnosis:
    """Return the verdict in words, with findings and remedies.

    Args:
        tensors: of `examine_tensors`.
        wirings: of `measure_wirings`; None if the tensors do not make a head.
        controls: None likewise.
    """
    findings = _tensor_findings(tensors) + _control_findings(controls)
    best, alike, likeness = None, [], ""
    if wirings is not None:
        best = best_wiring({row.wiring: row.against_right for row in wirings})
        findings += _wiring_findings(wirings, best)
        alike = [row.wiring for row in wirings if row.wiring != best and not row.against_best.is_clear_loss]
        likeness = f"; no difference between {_joined(alike, best)} on these prompts" if alike else ""
    verdict = (
        "nothing is wrong with this head: its tensors are sound and no wiring fits it better than the right one"
        f"{likeness}"
    )
    if findings:
        fits = "" if best in (None, RIGHT) else f", which fits the wiring {best} best"
        verdict = f"something is wrong with this head{fits}{likeness}; faults and remedies:"
    return Diagnosis(healthy=not findings, best=best, alike=alike, verdict=verdict, findings=findings)


def _control_findings(controls: DoctorControls | None) -> list[str]:
    if controls is None:
        return []
    failed = {
        "shifted_target": controls.shifted_target.outcome is Outcome.failed,
        "all_accept": not controls.all_accept.passed,
    }
    return [f"The control {name} failed: do not trust these numbers." for name in failed if failed[name]]


def _tensor_findings(tensors: TensorFaults) -> list[str]:
    faults = [
        ("missing", tensors.missing, "Export or convert the head again; no name may be dropped."),
        ("unexpected", tensors.unexpected, "They belong to another model or naming; servers skip them silently."),
        ("misshaped", tensors.misshaped, "The head belongs to another backbone, or was converted wrongly."),
        (
            "non-finite",
            tensors.non_finite,
            "Go back to an earlier checkpoint and lower the learning rate; of a release, restore the file.",
        ),
        ("zero", tensors.zero, "They were never filled."),
    ]
    findings = [f"They look like {DSPARK}."] if tensors.is_dspark else []
    findings += [f"{len(names)} {kind}: {_listed(names)}. {remedy}" for kind, names, remedy in faults if names]
    if tensors.same_as_stock and len(tensors.same_as_stock) == tensors.expected:
        findings.append("Every tensor equals the stock head's: nothing was trained.")
    return findings


def _wiring_findings(rows: list[WiringResult], best: str) -> list[str]:
    """Return the fault of the best wiring, or of a head that drafts under no wiring."""
    right = rows[0].acceptance_length
    if best != RIGHT:
        row = next(row for row in rows if row.wiring == best)
        remedy = next(wiring.remedy for wiring in WIRINGS if wiring.name == best)
        (low, high), gain = row.against_right.interval, row.against_right.gain
        return [
            f"The head fits best with {row.feeds}. It then accepts {gain:.2f} more tokens a pass ({low:.2f} to "
            f"{high:.2f}) than with the inputs that servers give it. If training feeds it like this: {remedy}"
        ]
    if right < NO_HEAD:
        return [
            f"The head accepts almost nothing, {right:.2f} tokens a pass, and no wiring makes it better: its weights "
            "are untrained, were not loaded, or belong to another backbone."
        ]
    return []


def _joined(alike: list[str], best: str) -> str:
    """Join names: ["own_keys", "right"], "no_prefill" -> own_keys, the right wiring and no_prefill."""
    names = ["the right wiring" if name == RIGHT else name for name in [*alike, best]]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _listed(names: list[str]) -> str:
    """Join the first five names, and count the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
