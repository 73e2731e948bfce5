"""One self-contained HTML page of an evaluation: no script, no request, readable on a phone."""

from __future__ import annotations

from pathlib import Path

from mtptrain.evaluation.report import breakdown_tables, plots
from mtptrain.evaluation.report.headline import (
    backbone_text,
    certificate_details,
    certificate_text,
    chosen_texts,
    headline,
    headline_text,
    seen_text,
    seen_texts,
    speed_text,
)
from mtptrain.evaluation.report.tables import domain_table, drafts_table, length_table, position_table, speed_table
from mtptrain.evaluation.report.template import captioned, origin_facts, sentence, write_page
from mtptrain.evaluation.report.training_page import training_content
from mtptrain.evaluation.result import Evaluation
from mtptrain.run.record import RunRecord

REPORT_FILE = "report.html"
SHOWN_DETAILS = 100


def write_report(evaluation: Evaluation, path: Path, training: RunRecord | None = None) -> None:
    """Write the evaluation as an HTML file, atomically.

    Args:
        evaluation: the result.
        path: the file; its folder is made if it is missing.
        training: record of the training of its last head; None if it is not at hand.
    """
    course = {"training_figures": []} if training is None else training_content(training)
    write_page("page.html", _content(evaluation) | course, path)


def _content(evaluation: Evaluation) -> dict[str, object]:
    """Return the values of the names in page.html."""
    certificate = evaluation.certificate
    return {
        "evaluation": evaluation,
        "title": f"mtptrain evaluation of {evaluation.backbone.name}",
        "kind": headline(evaluation).value,
        "headline": sentence(headline_text(evaluation)),
        "notes": [
            sentence(text) for text in [speed_text(evaluation), *seen_texts(evaluation), *chosen_texts(evaluation)]
        ],
        "certificate_text": certificate_text(certificate),
        "certificate_details": certificate_details(certificate),
        "shown_details": SHOWN_DETAILS,
        "lengths": length_table(evaluation),
        "drafts": drafts_table(evaluation),
        "speeds": speed_table(evaluation),
        "domains": domain_table(evaluation),
        "positions": position_table(evaluation),
        "steps": breakdown_tables.step_table(evaluation),
        "times": breakdown_tables.time_table(evaluation),
        "breakdowns": breakdown_tables.breakdown_tables(evaluation),
        "thresholds": breakdown_tables.threshold_table(evaluation),
        "passes": breakdown_tables.pass_table(evaluation),
        "counts": breakdown_tables.count_table(evaluation),
        "figures": captioned(_speed_figures(evaluation)),
        "loss_figures": captioned(_loss_figures(evaluation)),
        "provenance": _provenance(evaluation),
    }


def _speed_figures(evaluation: Evaluation) -> dict[str, str | None]:
    return {
        "Acceptance length (95 % intervals)": plots.acceptance_length(evaluation),
        "Gain over stock (95 % intervals)": plots.gain(evaluation),
        "Speed-up (bars: quartiles, dots: batches)": plots.speedup(evaluation),
        "Speed-up by batch (medians)": plots.batch_speedup(evaluation),
        "Conditional acceptance by position": plots.acceptance_by_position(evaluation),
    }


def _loss_figures(evaluation: Evaluation) -> dict[str, str | None]:
    by_kind = {
        f"Acceptance by {title}": plots.acceptance_by(evaluation, kind)
        for kind, title in breakdown_tables.KIND_TITLES.items()
    }
    return {
        "Where drafted tokens are lost": plots.losses(evaluation),
        **by_kind,
        "Confidence against acceptance": plots.calibration(evaluation),
    }


def _provenance(evaluation: Evaluation) -> dict[str, str]:
    """Return the origin of the figures, name by name, as plain text."""
    backbone, prompts, policy = evaluation.backbone, evaluation.prompts, evaluation.policy
    heads = {
        f"{head.name} head": f"{head.checkpoint} ({head.mode}, depth {head.depth}, {head.parameters:,} parameters)"
        for head in evaluation.heads
    }
    seen = [
        seen_text(f"the {head.name} head", head.seen_prompts)
        for head in evaluation.heads
        if head.seen_prompts is not None
    ]
    top_k = "" if policy.top_k is None else f"top_k {policy.top_k}, "
    return {
        **origin_facts(evaluation.provenance),
        "Backbone": f"{backbone_text(evaluation).removeprefix('backbone ')}; {backbone.parameters:,} parameters, "
        f"fingerprint {backbone.fingerprint}",
        **heads,
        "Prompts": f"{prompts.count} {prompts.source} prompts of {prompts.prompt_tokens} tokens, "
        f"{prompts.new_tokens} new tokens each; " + "; ".join([f"{prompts.conversations} independent groups", *seen]),
        "Policy": f"temperature {policy.temperature}, {top_k}top_p {policy.top_p}, draft {policy.draft.value}, "
        f"verification {policy.verification.value}, min_confidence {policy.min_confidence}, min_p {policy.min_p}, "
        f"penalties: repetition {policy.repetition_penalty}, frequency {policy.frequency_penalty}, "
        f"presence {policy.presence_penalty}, past the depth of stacked modules {policy.past_depth.value}, "
        f"numerics {policy.served_as.value}",
        "Plain decoding": "; ".join(
            f"{rate:,.1f} tokens/s at batch {size}" for size, rate in evaluation.plain_tokens_per_second.items()
        ),
    }
