import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtptrain.evaluation.report import plots
from mtptrain.evaluation.report.anatomy import KINDS
from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.table import (
    Outcome,
    clock_verdict,
    length_grid,
    outcome,
    position_grid,
    print_summary,
    verdict,
)
from tests.evaluation.sample import sample_evaluation

# K draft length, k position in the draft from 1.

VOID_TAGS = {"meta", "link", "br"}
DIFFERENCE = {"head": "trained", "prompt": 3, "draft_length": 2, "position": 17, "gap": 0.12}
EXTREME = [-0.31, -12.5, 0.0, 9.875, 123.456]


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(evaluation: dict[str, Any], folder: Path) -> str:
    write_report(evaluation, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def printed(evaluation: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(evaluation, Console(file=stream, width=width))
    return stream.getvalue()


def with_gain(value: float, interval: list[float]) -> dict[str, Any]:
    evaluation = sample_evaluation()
    evaluation["gain"]["4"] = {"gain": value, "interval": interval}
    return evaluation


def with_failed_certificate() -> dict[str, Any]:
    evaluation = sample_evaluation()
    certificate = evaluation["certificate"]
    certificate["passed"] = False
    certificate["greedy_identity"] |= {"identical": 47, "differences": [DIFFERENCE]}
    passes = {"head": "stock", "prompt": 5, "draft_length": 1, "loop_passes": 21, "replay_passes": 22}
    certificate["replay_equals_loop"] |= {"equal": 47, "differences": [passes]}
    return evaluation


def table_figures(evaluation: dict[str, Any]) -> set[str]:
    grids = (length_grid(evaluation), position_grid(evaluation))
    cells = [cell for grid in grids for row in grid.rows for cell in row]
    return {text for cell in cells for text in (cell.value, cell.spread) if text}


@pytest.mark.parametrize(
    ("value", "interval", "expected", "words"),
    [
        (0.35, [0.29, 0.41], Outcome.gain, "+0.35 over stock (+0.29 to +0.41)"),
        (0.03, [-0.05, 0.11], Outcome.unclear, "no evidence of a gain over stock: +0.03 (-0.05 to +0.11)"),
        (0.03, [0.0, 0.06], Outcome.unclear, "no evidence of a gain over stock: +0.03 (+0.00 to +0.06)"),
        (0.0, [0.0, 0.0], Outcome.unclear, "no evidence of a gain over stock: +0.00"),
        (-0.2, [-0.31, -0.09], Outcome.loss, "a loss of 0.20 against stock (-0.31 to -0.09)"),
    ],
)
def test_verdict_follows_the_interval_of_the_gain(
    value: float, interval: list[float], expected: Outcome, words: str
) -> None:
    evaluation = with_gain(value, interval)
    assert outcome(evaluation) is expected
    assert words in verdict(evaluation)
    assert verdict(evaluation).startswith("trained head: 2.99 tokens a verify pass at K=4 (2.88 to 3.11), ")


def test_verdict_speaks_of_the_longest_draft_even_where_a_shorter_one_gains() -> None:
    evaluation = with_gain(-0.2, [-0.31, -0.09])
    evaluation["gain"]["1"] = {"gain": 0.5, "interval": [0.4, 0.6]}
    assert outcome(evaluation) is Outcome.loss


@pytest.mark.parametrize("name", ["stock", "trained"])
def test_verdict_of_one_head_claims_no_gain(name: str) -> None:
    evaluation = sample_evaluation(heads=(name,))
    assert outcome(evaluation) is Outcome.single
    assert verdict(evaluation).startswith(f"{name} head: ")
    assert "no other head to compare" in verdict(evaluation)


def test_verdict_of_a_failed_certificate_withdraws_the_figures() -> None:
    assert outcome(with_failed_certificate()) is Outcome.failed
    assert verdict(with_failed_certificate()).startswith("CERTIFICATE FAILED, these figures do not count: ")


def test_clock_verdict_says_when_every_draft_length_is_slower() -> None:
    evaluation = sample_evaluation()
    assert "1.41x at K=2 (quartiles 1.37 to 1.46)" in clock_verdict(evaluation)
    for measured in evaluation["speedup"]["1"]["trained"].values():
        measured["median"] /= 2
    assert "no K is faster than plain decoding" in clock_verdict(evaluation)


@pytest.mark.parametrize("draft_length", [1, 3, 8])
@pytest.mark.parametrize("heads", [("stock", "trained"), ("trained",), ("stock",)])
def test_summary_fits_80_columns_with_every_figure_whole(draft_length: int, heads: tuple[str, ...]) -> None:
    evaluation = sample_evaluation(draft_length, heads)
    text = printed(evaluation)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    for figure in table_figures(evaluation):
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), figure
    assert "2.811 nats/token, 1.217 bits/byte" in text
    assert "certificate passed: output identical to plain greedy 48/48; replay = loop 48/48; " in " ".join(text.split())


@pytest.mark.parametrize(("width", "speed"), [(80, 123.456), (60, 1.234)])
def test_summary_wraps_rather_than_cuts_figures_that_do_not_fit(width: int, speed: float) -> None:
    evaluation = sample_evaluation()
    for head in ("stock", "trained"):
        evaluation["speedup"]["1"][head]["4"] |= {"median": speed, "quartiles": [speed / 1.01, speed * 1.01]}
    text = printed(evaluation, width)
    for word in " ".join(table_figures(evaluation)).split():
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word


def test_summary_shows_an_unreached_position_as_missing() -> None:
    evaluation = sample_evaluation()
    evaluation["heads"][1]["replay"]["4"]["conditional"][3] = None
    rows = [line.split() for line in printed(evaluation).splitlines() if line.startswith(" 4 ")]
    assert rows[-1][:3] == ["4", "0.620", "-"]


def test_summary_of_a_failed_certificate_names_what_differed() -> None:
    text = " ".join(printed(with_failed_certificate()).split())
    assert text.count("CERTIFICATE FAILED") == 2
    assert "output identical to plain greedy 47/48; replay = loop 47/48" in text
    assert "trained head, prompt 3, K=2: other token than plain greedy at position 17, logit gap 1.2e-01" in text
    assert "stock head, prompt 5, K=1: 21 passes in the loop, 22 in the replay" in text


def test_summary_counts_near_ties_without_failing() -> None:
    evaluation = sample_evaluation()
    evaluation["certificate"]["greedy_identity"] |= {"identical": 47, "near_ties": [{**DIFFERENCE, "gap": 2e-6}]}
    text = " ".join(printed(evaluation).split())
    assert "certificate passed: output identical to plain greedy 47/48 (1 near tie); replay" in text


def test_report_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = report_of(sample_evaluation(), tmp_path)
    page = Page(text)
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "img", "iframe", "object", "embed"}
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert "@import" not in text
    assert not re.search(r"url\(\s*[\"']?(?!#)", text)


@pytest.mark.parametrize("heads", [("stock", "trained"), ("trained",)])
@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_report_holds_the_verdict_and_every_figure_of_the_table(
    draft_length: int, heads: tuple[str, ...], tmp_path: Path
) -> None:
    evaluation = sample_evaluation(draft_length, heads)
    text = unescape(report_of(evaluation, tmp_path))
    assert verdict(evaluation)[1:] in text
    assert clock_verdict(evaluation)[1:] in text
    for figure in table_figures(evaluation):
        assert f">{figure}<" in text
    assert text.count("<svg ") == 8 + (len(heads) == 2)


def test_report_holds_the_provenance(tmp_path: Path) -> None:
    evaluation = sample_evaluation()
    page = Page(report_of(evaluation, tmp_path))
    for part in (
        "'checkpoint=outputs/distill/first run'",
        "torch 2.11.0",
        "Example CPU @ 2.60GHz",
        "612,480 parameters",
    ):
        assert part in page.text
    assert evaluation["provenance"]["git_commit"] in page.text
    evaluation["provenance"]["git_commit"] = None
    assert "not a git checkout" in report_of(evaluation, tmp_path)


def test_report_escapes_every_text_that_is_not_ours(tmp_path: Path) -> None:
    evil = """<script>alert("1")</script>&amp;'$style ${x}"""
    evaluation = sample_evaluation()
    evaluation["backbone"]["name"] = evil
    evaluation["provenance"] |= {"command": [evil], "git_commit": evil, "started": evil, "versions": {evil: evil}}
    evaluation["provenance"]["hardware"] |= {"processor": evil, "gpus": [evil]}
    for head in evaluation["heads"]:
        head["checkpoint"] = evil
        head["samples"][0] |= {"prompt": evil, "pieces": [{"text": evil, "kind": "accepted"}]}
    text = report_of(evaluation, tmp_path)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 10


def test_report_colours_tokens_by_where_they_came_from(tmp_path: Path) -> None:
    text = report_of(sample_evaluation(), tmp_path)
    assert '<mark class="accepted"> the</mark><mark class="accepted"> file</mark>' in text
    assert '<mark class="bonus">, if &lt;open&gt; &amp; &quot;dirty&quot;.</mark>' in text
    assert '<mark class="rejected">&#8629;</mark><mark class="bonus">self</mark>' in text
    assert '<span class="prompt">    def close(self):\n        </span>' in text


def test_report_prints_a_prompt_among_the_pieces_only_once(tmp_path: Path) -> None:
    evaluation = sample_evaluation(heads=("trained",))
    sample = evaluation["heads"][0]["samples"][0]
    sample["pieces"] = [{"text": sample["prompt"], "kind": "prompt"}, *sample["pieces"]]
    assert report_of(evaluation, tmp_path).count("def close(self)") == 1


def test_report_of_a_failed_certificate_says_so_at_the_top(tmp_path: Path) -> None:
    text = report_of(with_failed_certificate(), tmp_path)
    assert '<h1 class="failed">CERTIFICATE FAILED, these figures do not count' in text
    assert '<p class="badge failed">CERTIFICATE FAILED: output identical to plain greedy 47/48' in text
    assert "stock head, prompt 5, K=1: 21 passes in the loop, 22 in the replay" in text


def test_report_works_with_one_batch_size_one_domain_and_no_samples(tmp_path: Path) -> None:
    evaluation = sample_evaluation(heads=("trained",))
    for name in ("speedup", "steps", "plain_tokens_per_second"):
        del evaluation[name]["4"]
    head = evaluation["heads"][0]
    del head["domains"]["prose"]
    head["samples"] = []
    text = report_of(evaluation, tmp_path)
    assert "Acceptance length by domain" not in text
    assert text.count("<svg ") == 7


def test_report_names_the_failed_parts_of_a_certificate(tmp_path: Path) -> None:
    evaluation = sample_evaluation()
    certificate = evaluation["certificate"]
    certificate["passed"] = False
    certificate["sampler"] |= {
        "passed": False,
        "block": {"passed": False, "statistic": 99.5, "dof": 40, "p_value": 1e-6},
    }
    certificate["controls"] |= {"passed": False, "shifted_target_stock": {"passed": False}}
    test = {"head": "stock", "draft_length": 2, "passes": 90, "expected": 70.25, "p_value": 1e-9}
    certificate["replay_law"] = {"passed": False, "tests": [test]}
    text = Page(report_of(evaluation, tmp_path)).text
    assert "sampled loops follow replay's law FAILED (1 tests); sampler FAILED; controls FAILED" in text
    assert "stock head, K=2: 90 passes in the loop, 70.2 expected, p=1.0e-09" in text
    assert "sampler, block verification: chi-square 99.5 at 40 degrees of freedom, p=1.0e-06" in text
    assert "control shifted_target_stock failed" in text


def test_report_is_the_same_bytes_for_the_same_evaluation(tmp_path: Path) -> None:
    assert report_of(sample_evaluation(), tmp_path) == report_of(sample_evaluation(), tmp_path)


def test_ids_are_unique_on_the_page_and_every_reference_has_one(tmp_path: Path) -> None:
    page = Page(report_of(sample_evaluation(8), tmp_path))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    references |= {found for _, _, value in page.attributes for found in re.findall(r"url\(#([^)]*)\)", value)}
    assert references
    assert references <= set(ids)


def test_plots_take_their_colours_from_the_page() -> None:
    text = plots.acceptance_length(sample_evaluation())
    assert "var(--trained, #0b6bb0)" in text
    assert plots.INK not in text
    assert "currentColor" in text


def test_acceptance_is_drawn_for_every_kind_with_several_buckets() -> None:
    """Names of buckets, which may be a user's, are shown as they are."""
    evaluation = sample_evaluation()
    drawn = {kind: plots.acceptance_by(evaluation, kind) for kind in KINDS}
    assert {kind for kind, text in drawn.items() if text} == {"token_class", "domain"}
    for text in filter(None, drawn.values()):
        assert "digits &lt;0-9&gt; $a$" in text
    evaluation["heads"][0]["breakdown"]["by"]["entropy"] = [{"bucket": "below 0.1", "acceptance": 0.9}]
    assert plots.acceptance_by(evaluation, "entropy") is None


def test_gain_has_no_plot_without_a_second_head() -> None:
    assert plots.gain(sample_evaluation(heads=("trained",))) is None


@pytest.mark.parametrize("value", EXTREME)
def test_plots_draw_any_finite_figure(value: float) -> None:
    evaluation = sample_evaluation()
    evaluation["gain"]["4"] = {"gain": value, "interval": [value, value]}
    evaluation["speedup"]["1"]["trained"]["1"] |= {"median": value, "quartiles": [value] * 2, "per_batch": [value]}
    evaluation["heads"][1]["replay"]["4"]["conditional"] = [None] * 4
    drawn = [plots.acceptance_by_position(evaluation), plots.gain(evaluation), plots.speedup(evaluation)]
    assert all(text is not None and "nan" not in text for text in drawn)
