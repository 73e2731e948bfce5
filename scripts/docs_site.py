"""A hook of MkDocs (mkdocs.yml): lay the site out as the repository, so that links between files hold on both.

`docs/plan.md` is the page `docs/plan/`, README.md is the home page, and `../kernels/README.md` has the same target as
on a code host. A linked folder without a README.md becomes a list of its files, and linked files that are no pages are
copied. `api/*.md` are made here, for mkdocstrings.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    "examples/README.md",
)  # pages that are not in docs/
LINK = re.compile(r"(?<=\]\()(?P<target>[\w./-]+)(?=[#)])")  # of a Markdown link to a file, without its anchor
REST = "More"  # section of the pages that mkdocs.yml does not list

# Pages of the API: title, then modules.
API = {
    "mtptrain": ["mtptrain"],
    "mtp": ["mtptrain.mtp.block", "mtptrain.mtp.stack", "mtptrain.mtp.rollout", "mtptrain.mtp.start"],
    "losses": ["mtptrain.losses.rollout", "mtptrain.losses.next_token"],
    "backbone": ["mtptrain.backbone.load", "mtptrain.backbone.streams", "mtptrain.backbone.cache"],
    "training": ["mtptrain.training.trainer", "mtptrain.training.checkpoint"],
    "decoding": ["mtptrain.decoding.speculative", "mtptrain.decoding.policy", "mtptrain.decoding.results"],
    "replay": ["mtptrain.replay.replay", "mtptrain.replay.markov"],
    "traces": ["mtptrain.traces.prompts", "mtptrain.traces.benchmarks", "mtptrain.traces.file"],
    "evaluation": ["mtptrain.evaluation.result", "mtptrain.evaluation.head_result", "mtptrain.evaluation.metrics"],
    "planning": ["mtptrain.planning.speedup", "mtptrain.planning.decoding", "mtptrain.planning.result"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the pages of docs/ that the navigation does not list, and those of the API."""
    listed = str(config.nav)
    rest = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if f"docs/{path.name}" not in listed]
    assert config.nav is not None
    if rest:
        config.nav.append({REST: rest})
    config.nav.append({"API": [f"api/{name}.md" for name in API]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put every file at its path in the repository, and add the files that pages link to."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            _add(files, config, f"docs/{file.src_uri}")
    for name in OUTSIDE:
        _add(files, config, name)
    for name, modules in API.items():
        content = f"# {name}\n\n" + "".join(f"::: {module}\n\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=content))
    read: set[str] = set()
    while unread := [file for file in files.documentation_pages() if file.src_uri not in read]:
        for file in unread:  # a linked page has links of its own
            read.add(file.src_uri)
            for target in _targets(file):
                _add_target(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to folders lead to their pages."""

    def _with_page(match: re.Match[str]) -> str:
        is_folder = (ROOT / _resolved(page.file.src_uri, match["target"])).is_dir()
        return f"{match['target'].rstrip('/')}/README.md" if is_folder else match["target"]

    return LINK.sub(_with_page, markdown)


def _resolved(source: str, target: str) -> str:
    """Return the path in the repository of a link in a page."""
    return os.path.normpath(PurePosixPath(source).parent / target)


def _targets(file: File) -> list[str]:
    return [_resolved(file.src_uri, match["target"]) for match in LINK.finditer(file.content_string)]


def _add(files: Files, config: MkDocsConfig, name: str) -> None:
    if files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def _add_target(files: Files, config: MkDocsConfig, name: str) -> None:
    """Add a file of the repository, or a folder: its README.md or a list of its files, and the files."""
    path = ROOT / name
    if path.is_file():
        _add(files, config, name)
    if not path.is_dir():
        return
    kept = [one for one in sorted(path.rglob("*")) if one.is_file() and "__pycache__" not in one.parts]
    inside = [one.relative_to(path).as_posix() for one in kept]
    for one in inside:
        _add(files, config, f"{name}/{one}")
    if files.get_file_from_path(f"{name}/README.md") is None:
        content = f"# {name}\n\n" + "".join(f"- [{one}]({one})\n" for one in inside)
        files.append(File.generated(config, f"{name}/README.md", content=content))
