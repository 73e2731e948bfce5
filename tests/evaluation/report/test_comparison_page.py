import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mtptrain.evaluation.compare import differing_settings
from mtptrain.evaluation.comparison_result import Comparison, SettingDifference
from mtptrain.evaluation.head_result import Gain, SeenPrompts
from mtptrain.evaluation.report.comparison_page import (
    comparison_headline,
    comparison_notes,
    print_result,
    write_comparison_page,
)
from mtptrain.evaluation.report.comparison_tables import DETECTABLE, domain_gain_table, gain_table
from mtptrain.evaluation.report.headline import Headline
from mtptrain.run.typed_json import from_json
from tests.evaluation.recorded import recorded_json
from tests.evaluation.report.test_page import Page, figures


@pytest.fixture
def comparison() -> Comparison:
    """A recorded comparison, with a gain at the longest K that leaves no doubt."""
    recorded = from_json(Comparison, recorded_json("comparison"))
    (one,), longest = recorded.comparisons, recorded.draft_length
    gain = {**one.gain, longest: Gain(0.3, (0.2, 0.4), 0.05)}
    one = replace(one, gain=gain, worse_on=[], verdict="B (distill) accepts more tokens a pass than A (stock)")
    return replace(recorded, comparisons=[one])


def page_of(comparison: Comparison, folder: Path) -> str:
    write_comparison_page(comparison, folder / "comparison.html")
    return (folder / "comparison.html").read_text(encoding="utf-8")


def with_third(comparison: Comparison, low: float, high: float) -> Comparison:
    """A third setting, whose gain at the longest K lies between the given ends."""
    (one,), head = comparison.comparisons, comparison.heads[1]
    gain = {**one.gain, comparison.draft_length: Gain((low + high) / 2, (low, high), 0.05)}
    third = replace(one, other="C (c)", gain=gain, verdict="verdict on C")
    return replace(comparison, heads=[*comparison.heads, replace(head, name="C (c)")], comparisons=[one, third])


def test_the_interval_of_one_group_is_named_as_on_other_pages(comparison: Comparison) -> None:
    assert f"with 95 % intervals over {comparison.prompts.count_text}." in gain_table(comparison).note
    single = replace(comparison, prompts=replace(comparison.prompts, conversations=1))
    assert "by replay, from one independent group of prompts" in gain_table(single).note


def test_the_page_begins_with_the_verdict_and_holds_every_figure(comparison: Comparison, tmp_path: Path) -> None:
    text = page_of(comparison, tmp_path)
    page = Page(text)
    assert f'<h1 class="gain">{comparison.comparisons[0].verdict}.</h1>' in text
    domains = domain_gain_table(comparison)
    assert domains is not None
    for figure in figures(gain_table(comparison)) | figures(domains):
        assert f">{figure}<" in text
    assert text.count("<svg ") == 5
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_head_that_saw_prompts_has_the_name_of_its_setting(comparison: Comparison) -> None:
    head = comparison.heads[1]
    (run,) = head.runs
    seen = replace(run, seen_prompts=SeenPrompts(8, 8, 3))
    single = replace(comparison, heads=[replace(head, runs=[seen])])
    assert comparison_notes(single) == [f"{head.name} saw 3 of 8 prompts in training"]
    several = replace(comparison, heads=[replace(head, runs=[seen, run])])
    assert comparison_notes(several) == [f"{run.checkpoint} saw 3 of 8 prompts in training"]


def test_domains_and_settings_are_on_the_terminal(comparison: Comparison) -> None:
    stream = io.StringIO()
    differences = [SettingDifference("train.learning_rate", [None, "0.004"])]
    print_result(replace(comparison, differences=differences), Console(file=stream, width=80))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "Acceptance length and gain by domain" in text
    assert f"Would have shown: {DETECTABLE}." in " ".join(text.split())
    assert "train.learning_rate" in text
    single = {"text": comparison.heads[0].replay[3]}
    heads = [replace(head, domains=single) for head in comparison.heads]
    assert domain_gain_table(replace(comparison, heads=heads)) is None


@pytest.mark.parametrize(
    ("low", "high", "kind", "text"),
    [
        (0.1, 0.2, Headline.gain, "2 of 2 settings accept more tokens a pass than A (stock), at K=3"),
        (-0.1, 0.2, Headline.unclear, "1 of 2 settings accept more tokens a pass than A (stock), at K=3"),
        (-0.2, -0.1, Headline.unclear, "1 of 2 settings accept more tokens a pass than A (stock), and 1 fewer, at K=3"),
    ],
)
def test_several_verdicts_are_counted_and_listed(
    comparison: Comparison, low: float, high: float, kind: Headline, text: str, tmp_path: Path
) -> None:
    several = with_third(comparison, low, high)
    assert comparison_headline(several) == (kind, text)
    page = page_of(several, tmp_path)
    assert ">Verdict on C.</li>" in page
    assert "C - A" in page


def test_a_domain_that_loses_is_no_gain(comparison: Comparison) -> None:
    one = replace(comparison.comparisons[0], worse_on=["prose"])
    assert comparison_headline(replace(comparison, comparisons=[one]))[0] is Headline.unclear


def test_only_settings_that_are_not_the_same_in_all_runs_are_listed() -> None:
    first, second = {"seed": 0, "train.steps": 3, "data.path": "a"}, {"seed": 1, "train.steps": 3, "data.path": "b"}
    other = {"seed": 0, "train.steps": 5, "data.path": "a", "loss.new": True}
    assert differing_settings([[None], [first]]) == []
    assert differing_settings([[None], [first, second], [other]]) == [
        SettingDifference("seed", [None, "0, 1", "0"]),
        SettingDifference("train.steps", [None, "3", "5"]),
        SettingDifference("data.path", [None, "a, b", "a"]),
        SettingDifference("loss.new", [None, "null", "true"]),
    ]


def test_the_page_escapes_every_text_from_outside(comparison: Comparison, tmp_path: Path) -> None:
    evil = """<script>alert("1")</script>&amp;'$x$"""
    (one,) = comparison.comparisons
    heads = [replace(head, name=f"{head.letter} ({evil})") for head in comparison.heads]
    domains = {evil: one.domains["code"], "prose": one.domains["prose"]}
    heads = [replace(head, domains={evil: head.domains["code"], "prose": head.domains["prose"]}) for head in heads]
    changed = replace(
        comparison,
        heads=heads,
        comparisons=[replace(one, verdict=evil, domains=domains)],
        differences=[SettingDifference(evil, [evil, None])],
    )
    text = page_of(changed, tmp_path)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 6
