import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mtptrain.evaluation.head_result import Piece, PieceKind, SeenPrompts
from mtptrain.evaluation.report.headline import headline_text, speed_text
from mtptrain.evaluation.report.page import write_report
from mtptrain.evaluation.report.tables import Grid, length_table, position_table
from mtptrain.evaluation.result import Evaluation
from tests.evaluation.recorded import EVALUATIONS, recorded_evaluation
from tests.evaluation.report.changes import with_failed_certificate, with_head, with_seen_prompts

VOID_TAGS = {"meta", "link", "br"}
NUM_PLOTS = {"greedy": 11, "sampled": 10, "single": 7}
Report = Callable[[Evaluation], str]


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


@dataclass(frozen=True)
class Rendered:
    name: str
    evaluation: Evaluation
    text: str
    page: Page


@pytest.fixture(scope="module", params=list(EVALUATIONS))
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The page of a recorded evaluation."""
    evaluation = recorded_evaluation(request.param)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(evaluation, path)
    text = path.read_text(encoding="utf-8")
    return Rendered(request.param, evaluation, text, Page(text))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def write(evaluation: Evaluation) -> str:
        write_report(evaluation, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def figures(grid: Grid) -> set[str]:
    return {text for row in grid.rows for cell in row for text in (cell.value, cell.spread) if text}


def test_report_makes_no_network_request(rendered: Rendered) -> None:
    assert not {tag for tag, _, _ in rendered.page.attributes} & {"script", "img", "iframe", "object", "embed"}
    assert "<script" not in rendered.text
    names = ("src", "href", "xlink:href", "srcset", "action")
    links = [value for _, name, value in rendered.page.attributes if name in names]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert "@import" not in rendered.text
    assert not re.search(r"url\(\s*[\"']?(?!#)", rendered.text)


def test_report_holds_the_headline_and_every_figure_of_the_tables(rendered: Rendered) -> None:
    evaluation, text = rendered.evaluation, unescape(rendered.text)
    assert headline_text(evaluation)[1:] in text
    assert speed_text(evaluation)[1:] in text
    for figure in figures(length_table(evaluation)) | figures(position_table(evaluation)):
        assert f">{figure}<" in text
    assert text.count("<svg ") == NUM_PLOTS[rendered.name]
    assert ("Acceptance length by domain" in text) == (rendered.name != "single")


def test_report_defines_its_terms(rendered: Rendered) -> None:
    text = " ".join(rendered.page.text.split())
    for definition in ("are accepted", "The stock head came with the backbone", "Alpha: overlap with the backbone's"):
        assert definition in text


def test_report_holds_the_provenance(rendered: Rendered) -> None:
    origin = rendered.evaluation.provenance
    prompts = " 'prompts=[outputs/code.jsonl,outputs/prose.jsonl]'" if rendered.name != "single" else ""
    for part in (
        f"python -m mtptrain +recipe=evaluate checkpoint=outputs/distill{prompts}",
        f"torch {origin.versions['torch']}",
        "AMD EPYC, 2 cores",
        "293,117 parameters",
        str(origin.git_commit),
    ):
        assert part in rendered.page.text


def test_report_shows_the_origin_of_every_token(rendered: Rendered) -> None:
    for head in rendered.evaluation.heads:
        for sample in head.samples:
            breaks = {PieceKind.rejected: "↵"}
            shown = [one.text.replace("\n", breaks.get(one.kind, "↵\n")) for one in sample.pieces]
            assert sample.prompt + "".join(shown) in rendered.page.text
    classes = {value for tag, name, value in rendered.page.attributes if (tag, name) == ("mark", "class")}
    assert classes == {"accepted", "rejected", "bonus"}


def test_a_long_run_of_rejected_spaces_breaks_at_the_edge(rendered: Rendered) -> None:
    style = re.search(r"\npre \{(.*?)\}", rendered.text, re.DOTALL)
    assert style is not None
    assert "white-space: break-spaces" in style[1]  # pre-wrap lets spaces hang beyond the box


def test_ids_are_unique_on_the_page_and_every_reference_has_one(rendered: Rendered) -> None:
    attributes = rendered.page.attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for _, name, value in attributes if name == "xlink:href"}
    references |= {target for _, _, value in attributes for target in re.findall(r"url\(#([^)]*)\)", value)}
    assert references
    assert references <= set(ids)


def test_report_is_the_same_bytes_for_the_same_evaluation(rendered: Rendered, report: Report) -> None:
    assert report(rendered.evaluation) == rendered.text


def test_report_of_a_failed_certificate_starts_with_the_failure(report: Report) -> None:
    text = report(with_failed_certificate(recorded_evaluation()))
    assert '<h1 class="failed">CERTIFICATE FAILED, these figures do not count' in text
    assert '<p class="badge failed">CERTIFICATE FAILED: output identical to plain greedy 53/54' in text
    assert "<li>stock head, prompt 5, K=1: 21 passes in the loop, 22 in the replay</li>" in text


def test_report_escapes_every_text_from_outside(report: Report) -> None:
    evil = """<script>alert("1")</script>&amp;'{{ evaluation }} $style"""
    evaluation = recorded_evaluation()
    origin = evaluation.provenance
    hardware = replace(origin.hardware, processor=evil, gpus=(evil,))
    evaluation = replace(
        evaluation,
        backbone=replace(evaluation.backbone, name=evil),
        provenance=replace(
            origin, command=[evil], git_commit=None, started=evil, versions={evil: evil}, hardware=hardware
        ),
    )
    for head in evaluation.heads:
        sample = replace(head.samples[0], prompt=evil, pieces=[Piece(evil, PieceKind.accepted)])
        domains = {evil: head.domains["code"], "prose": head.domains["prose"]}
        evaluation = with_head(evaluation, replace(head, checkpoint=evil, samples=[sample], domains=domains))
    evaluation = replace(evaluation, gain_by_domain=dict.fromkeys((evil, "prose"), evaluation.longest_gain))
    text = report(evaluation)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(evil) >= 11
    assert "not a git checkout" in page.text


def test_report_works_without_samples(report: Report) -> None:
    evaluation = recorded_evaluation("single")
    text = report(with_head(evaluation, replace(evaluation.last_head, samples=[])))
    assert "No samples were kept." in text
    assert "<pre>" not in text


def test_prompts_that_were_seen_in_training_stand_below_the_headline(report: Report) -> None:
    text = report(with_seen_prompts(recorded_evaluation(), SeenPrompts(prompts=8, checked=8, seen=3)))
    assert '<p class="lead">The trained head saw 3 of 8 prompts in training.</p>' in text
    text = report(recorded_evaluation())  # whose head saw none
    assert '<p class="lead">The trained head saw' not in text
    assert "trained head saw 0 of 6 prompts in training" in Page(text).text
