import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from mtptrain.evaluation.report.breakdown_tables import time_table
from mtptrain.evaluation.report.tables import (
    MISSING_VALUE,
    domain_table,
    drafts_table,
    length_table,
    position_table,
    print_summary,
    speed_table,
    summary_tables,
)
from mtptrain.evaluation.result import Doubt, Evaluation, Spread
from tests.evaluation.recorded import EVALUATIONS, recorded_evaluation
from tests.evaluation.report.changes import (
    DIFFERENCE,
    only,
    quiet,
    with_acceptance,
    with_doubts,
    with_failed_certificate,
    with_head,
    with_speedup,
)


def printed(evaluation: Evaluation, width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(evaluation, Console(file=stream, width=width))
    return stream.getvalue()


def table_figures(evaluation: Evaluation) -> set[str]:
    cells = [cell for grid in summary_tables(evaluation) for row in grid.rows for cell in row]
    return {text for cell in cells for text in (cell.value, cell.spread) if text}


CASES = {name: recorded_evaluation(name) for name in EVALUATIONS}
CASES |= {
    "stock only": only(CASES["greedy"], "stock"),
    "trained only": only(CASES["greedy"], "trained"),
    "one draft length": replace(CASES["greedy"], draft_length=1),
}
SAMPLED = CASES["sampled"]
CASES["both kinds of draft"] = replace(
    SAMPLED,
    heads=[replace(head, other_drafts=dict.fromkeys(head.replay, head.replay[1])) for head in SAMPLED.heads],
)


def test_both_kinds_of_draft_stand_side_by_side() -> None:
    evaluation = CASES["both kinds of draft"]
    table = drafts_table(evaluation)
    assert table.headers == ["K", "stock\nsampled", "stock\ngreedy", "trained\nsampled", "trained\ngreedy"]
    head, row = evaluation.heads[1], table.rows[-1]
    assert row[3].value == f"{head.replay[evaluation.draft_length].acceptance_length:.2f}"
    assert row[4].value == f"{head.other_drafts[evaluation.draft_length].acceptance_length:.2f}"
    assert drafts_table(CASES["greedy"]) is None


@pytest.mark.parametrize("evaluation", CASES.values(), ids=CASES)
def test_summary_fits_80_columns_with_every_figure_whole(evaluation: Evaluation) -> None:
    text = printed(evaluation)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    for figure in table_figures(evaluation):
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), figure
    backbone = evaluation.backbone
    loss = f"{backbone.heldout_nats_per_token:.3f} nats/token, {backbone.heldout_bits_per_byte:.3f} bits/byte"
    assert loss in text
    compared = evaluation.certificate.greedy_identity.compared
    expected = f"certificate passed: output identical to plain greedy {compared}/{compared}; replay = loop "
    assert expected in " ".join(text.split())


@pytest.mark.parametrize(("width", "speed"), [(80, 123.456), (60, 1.234)])
def test_summary_wraps_rather_than_cuts_figures_that_do_not_fit(width: int, speed: float) -> None:
    evaluation = with_speedup(recorded_evaluation(), 3, Spread(speed, (speed / 1.01, speed * 1.01)))
    text = printed(evaluation, width)
    for word in " ".join(table_figures(evaluation)).split():
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word


def test_a_position_that_was_never_reached_is_missing() -> None:
    evaluation = recorded_evaluation()
    acceptance = evaluation.last_head.replay[3]
    conditional = [0.5, 0.4, None]
    row = position_table(with_acceptance(evaluation, replace(acceptance, conditional=conditional))).rows[-1]
    stock = evaluation.heads[0].replay[3].conditional[2]
    assert [cell.value for cell in row[:3]] == ["3", MISSING_VALUE if stock is None else f"{stock:.3f}", MISSING_VALUE]


def test_summary_of_a_failed_certificate_names_the_differences() -> None:
    evaluation = with_failed_certificate(recorded_evaluation())
    text, compared = " ".join(printed(evaluation).split()), evaluation.certificate.greedy_identity.compared
    assert text.count("CERTIFICATE FAILED") == 2
    assert f"identical to plain greedy {compared - 1}/{compared}; replay = loop {compared - 1}/{compared}" in text
    assert "trained head, prompt 3, K=2: other token than plain greedy at position 17, logit gap 1.2e-01" in text
    assert "stock head, prompt 5, K=1: 21 passes in the loop, 22 in the replay" in text


def test_summary_lists_the_first_differences_only() -> None:
    evaluation = with_failed_certificate(recorded_evaluation())
    greedy = replace(evaluation.certificate.greedy_identity, differences=[DIFFERENCE] * 15)
    text = printed(replace(evaluation, certificate=replace(evaluation.certificate, greedy_identity=greedy)))
    assert text.count("prompt 3, K=2: other token") == 10
    assert "and 6 more in evaluation.json" in text


def test_summary_counts_near_ties_without_failing() -> None:
    evaluation = recorded_evaluation()
    greedy, compared = evaluation.certificate.greedy_identity, evaluation.certificate.greedy_identity.compared
    greedy = replace(greedy, identical=compared - 1, near_ties=[replace(DIFFERENCE, gap=2e-6)])
    evaluation = replace(evaluation, certificate=replace(evaluation.certificate, greedy_identity=greedy))
    text = " ".join(printed(evaluation).split())
    assert (
        f"certificate passed: output identical to plain greedy {compared - 1}/{compared} (1 near tie); replay" in text
    )


def test_every_domain_has_a_row_in_its_order() -> None:
    evaluation = recorded_evaluation()
    names = [f"domain {number}" for number in range(12)]
    for head in evaluation.heads:
        evaluation = with_head(evaluation, replace(head, domains=dict.fromkeys(names, head.domains["code"])))
    evaluation = replace(evaluation, gain_by_domain=dict.fromkeys(names, evaluation.longest_gain))
    grid = domain_table(evaluation)
    assert grid is not None
    assert [row[0].value for row in grid.rows] == names
    assert {len(row) for row in grid.rows} == {len(grid.headers)} == {4}
    assert domain_table(recorded_evaluation("single")) is None


def test_a_domain_without_passes_has_no_figures_in_its_row() -> None:
    evaluation = recorded_evaluation()
    for head in evaluation.heads:
        evaluation = with_head(evaluation, replace(head, domains={**head.domains, "code": None}))
    evaluation = replace(evaluation, gain_by_domain={**(evaluation.gain_by_domain or {}), "code": None})
    grid = domain_table(evaluation)
    assert grid is not None
    (row,) = [row for row in grid.rows if row[0].value == "code"]
    assert [cell.value for cell in row[1:]] == [MISSING_VALUE] * 3


def test_time_table_has_every_batch_and_draft_length_and_every_phase() -> None:
    grid = time_table(recorded_evaluation())
    assert [row[0].value for row in grid.rows] == ["1, 1", "1, 2", "1, 3", "2, 1", "2, 2", "2, 3"]
    assert grid.headers[-5:] == ["prefill", "draft", "verify", "sample", "rewind"]


def test_speed_table_has_the_smallest_and_the_largest_batch() -> None:
    grid = speed_table(quiet(recorded_evaluation()))
    assert [tuple(cell.value for cell in row[:2]) for row in grid.rows] == [
        (batch, length) for batch in "12" for length in "123"
    ]
    assert grid.headers == ["batch", "K", "stock\nspeed-up", "trained\nspeed-up"]


def test_on_a_cpu_processor_time_stands_beside_the_clock() -> None:
    evaluation = recorded_evaluation()
    measured = {
        size: {
            name: {k: replace(one, processor=Spread(1.02, (0.99, 1.04))) for k, one in by_length.items()}
            for name, by_length in heads.items()
        }
        for size, heads in evaluation.speedup.items()
    }
    evaluation = replace(evaluation, speedup=measured)
    grid = speed_table(evaluation)
    assert grid.headers[2:] == ["stock\nspeed-up", "stock\nprocessor", "trained\nspeed-up", "trained\nprocessor"]
    assert grid.rows[0][3].value == "1.02x"
    assert max(map(len, printed(evaluation).splitlines())) <= 80


def test_a_doubtful_speed_up_is_marked_in_the_table() -> None:
    evaluation = with_doubts(quiet(recorded_evaluation()), 2, [Doubt.busy])
    grid = speed_table(evaluation)
    assert [row[3].value.startswith("? ") for row in grid.rows] == [False, True, False, False, False, False]
    assert "?: doubtful" in grid.note
    assert "?: doubtful" not in speed_table(quiet(recorded_evaluation())).note


def test_texts_that_end_at_their_first_token_have_no_figures() -> None:
    evaluation = recorded_evaluation()
    acceptance = replace(evaluation.last_head.replay[3], acceptance_length=None, interval=None)
    evaluation = replace(with_acceptance(evaluation, acceptance), gain={**(evaluation.gain or {}), 3: None})
    assert [cell.value for cell in length_table(evaluation).rows[-1][2:]] == [MISSING_VALUE] * 2
    assert "trained head: no verify pass, because every text ends at its first token" in " ".join(
        printed(evaluation).split()
    )
