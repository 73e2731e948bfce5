"""Commands of the pages: those under `<!-- runnable -->` run, in order, and all can be pasted into bash and zsh."""

import re
import shlex
from pathlib import Path

import pytest

from tests.command import ROOT, Light, run_main
from tests.light import certified

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
MARK, PREFIX = "<!-- runnable -->\n", ("python", "-m", "mtptrain")


def blocks(page: Path, mark: str = "") -> list[str]:
    """Return the bash blocks of a page, or only those below a mark."""
    text = page.read_text(encoding="utf-8")
    return re.findall(re.escape(mark) + r"```bash\n(.*?)```", text, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Return the words of every command of a block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


RUNNABLE = [page for page in PAGES if blocks(page, MARK)]


def test_some_pages_have_runnable_commands() -> None:
    assert len(RUNNABLE) > 2


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_marked_commands_run_in_order(
    page: Path, light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the random backbone, with small sizes and without figures of the screen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    sizes = [one for one in light if not one.startswith(("data=", "data.path="))]
    for block in blocks(page, MARK):
        for command in commands(block):
            assert tuple(command[:3]) == PREFIX, command
            given = {one.partition("=")[0] for one in command}
            small = [one for one in [*sizes, Light("data.max_documents=40")] if one.partition("=")[0] not in given]
            assert run_main(*small, *command[3:]) == 0, command


@pytest.mark.parametrize("page", [ROOT / one for one in ("README.md", "docs/data.md", "examples/README.md")])
def test_the_example_conversations_suffice_for_their_command(
    page: Path, light: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many prompts as the command itself measures: the files are short, so few are held out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    own = ("data", "data.path", "evaluation.every", "evaluation.num_prompts", "evaluation.prompt_tokens")
    small = [one for one in light if one.partition("=")[0] not in own]
    (command,) = re.findall(
        r"\+recipe=distill data=chat data\.path=examples/chat[^`\n]*", page.read_text(encoding="utf-8")
    )
    with certified():
        assert run_main(*small, *shlex.split(command)) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_shell_expands_nothing_in_a_command(page: Path) -> None:
    """zsh reads an unquoted bracket as a pattern and bash an unquoted brace with a comma as several words."""
    for block in blocks(page):
        for line in block.splitlines():
            bare = re.sub(r"\"[^\"]*\"|'[^']*'|#.*|\$\{?\w+\}?", "", line)
            assert not re.search(r"[\[\]{}*?<>]", bare), line
