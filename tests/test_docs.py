"""The site of the documentation: built strictly, whole, and without anything from a network."""

import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.command import ROOT
from tests.scripts import load_script

LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"?([^\" >]+)")
LINKED = re.compile(r"<a\b[^>]*?\bhref=\"?([^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning, such as a link to nowhere, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def pages(site: Path) -> list[Path]:
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def local_links(page: Path) -> set[Path]:
    """Return the files that a page links to."""
    found = (urldefrag(link).url for link in LINKED.findall(page.read_text(encoding="utf-8")))
    return {(page.parent / unquote(link)).resolve() for link in found if link and not re.match("[a-z]+:", link)}


def test_every_page_is_reached_from_the_first_one(site: Path) -> None:
    reached, new = set(), {site / "index.html"}
    while new:
        reached |= new
        linked = {link for page in new if page.suffix == ".html" for link in local_links(page)}
        assert all(link.exists() for link in linked), sorted(link for link in linked if not link.exists())
        new = linked - reached
    assert set(pages(site)) <= reached


def test_the_site_has_a_page_for_every_page_of_the_repository(site: Path) -> None:
    named = [*(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    expected = {path.relative_to(ROOT).with_suffix(".html") for path in named}
    built = {page.relative_to(site) for page in pages(site)}
    assert expected <= built
    assert {Path("index.html"), Path("kernels/index.html"), Path("examples/chat/index.html")} <= built
    assert "frozen DeepSeek-V4 backbone" in (site / "index.html").read_text(encoding="utf-8")


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in [*pages(site), site / "404.html"]:
        text = page.read_text(encoding="utf-8")
        assert [one for one in LOADED.findall(text) if re.match("(https?:)?//", one)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\"' (]*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_api_shows_docstrings(site: Path) -> None:
    text = (site / "api" / "planning.html").read_text(encoding="utf-8")
    assert "Return the tokens a pass with K drafts" in text
    assert "share of drafts kept at position k" in text


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    """The script that draws the figures."""
    return load_script("plot_speed")


def test_the_figures_of_the_page_on_speed_are_those_of_the_plan(plots: ModuleType) -> None:
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    for name, chart in plots.charts().items():
        drawing = (plots.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
        assert plots.digest(chart) in drawing, f"run scripts/plot_speed.py and read docs/speed.md again: {name}"
        assert f"(images/{name}.svg)" in page
    cost = plots.charts()["cost"].lines
    assert f"costs {cost['batch 1'][1]:.2f} plain passes" in page
    assert f"it costs {cost['batch 8'][1]:.2f}." in page


def test_a_chart_of_other_figures_is_noticed(plots: ModuleType, tmp_path: Path) -> None:
    chart = plots.Chart("x", "y", [0, 1], {"a": [1.0, None]})
    plots.draw(chart, tmp_path / "a.svg")
    assert plots.digest(chart) in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert plots.digest(plots.Chart("x", "y", [0, 1], {"a": [1.1, None]})) != plots.digest(chart)
