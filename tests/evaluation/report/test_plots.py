from dataclasses import replace

import pytest

from mtptrain.evaluation.head_result import BucketKind
from mtptrain.evaluation.report import plots
from mtptrain.evaluation.report.breakdown_tables import KIND_TITLES
from mtptrain.evaluation.report.drawing import INK
from mtptrain.evaluation.result import Spread
from tests.evaluation.recorded import recorded_evaluation
from tests.evaluation.report.changes import with_acceptance, with_buckets, with_gain, with_speedup

EXTREME = [-0.31, -12.5, 0.0, 9.875, 123.456]


def test_plots_take_their_colours_from_the_page() -> None:
    text = plots.acceptance_length(recorded_evaluation())
    assert "var(--trained, #0b6bb0)" in text
    assert INK not in text
    assert "currentColor" in text


def test_acceptance_is_drawn_for_every_kind_with_several_buckets() -> None:
    evaluation = recorded_evaluation()  # every context is of one bucket
    drawn = {kind for kind in KIND_TITLES if plots.acceptance_by(evaluation, kind)}
    assert drawn == set(KIND_TITLES) - {BucketKind.context}


def test_names_of_buckets_that_a_user_chose_are_shown_as_they_are() -> None:
    evaluation = with_buckets(recorded_evaluation(), BucketKind.domain, ["word start", "digits <0-9> $a$"])
    text = plots.acceptance_by(evaluation, BucketKind.domain)
    assert text is not None
    assert "digits &lt;0-9&gt; $a$" in text


def test_figures_that_compare_need_two_heads_or_two_batches() -> None:
    evaluation = recorded_evaluation("single")
    assert plots.gain(evaluation) is None
    assert plots.batch_speedup(evaluation) is None


@pytest.mark.parametrize("value", EXTREME)
def test_plots_draw_any_finite_figure(value: float) -> None:
    evaluation = with_gain(recorded_evaluation(), value, (value, value))
    evaluation = with_speedup(evaluation, 1, Spread(value, (value, value)))
    acceptance = replace(evaluation.last_head.replay[3], conditional=[None] * 3)
    evaluation = with_acceptance(evaluation, acceptance)
    drawn = [plots.acceptance_by_position(evaluation), plots.gain(evaluation), plots.speedup(evaluation)]
    assert all(text is not None and "nan" not in text for text in drawn)
