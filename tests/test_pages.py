"""Commands of README.md and docs/v4_flash.md compose, and pass the checks that need no weights."""

import re
import shlex
from pathlib import Path

import pytest

from mtptrain import cli
from tests.command import ROOT, Light, run_main

PAGE = ROOT / "docs" / "v4_flash.md"
OTHERS = ("hf download", "vllm serve")


def commands() -> list[str]:
    """Return the lines of all bash blocks of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def readme_commands() -> list[str]:
    """Return the commands of the table in README.md, `first`, then `second` as two."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## I want to ...")[2].partition("## ")[0]
    rows = [line.rpartition(" | ")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    return [code for row in rows for code in re.findall("`([^`]+)`", row) if "+recipe=" in code]


def settings(command: str) -> list[str]:
    """Return the settings of a command, without its launcher."""
    return [word for word in shlex.split(command) if re.match(r"\+?[a-z_.]+=", word)]


def test_a_command_is_ours_or_one_of_two_others() -> None:
    ours = ("python -m mtptrain ", "scripts/launch_torchrun.sh ", "sbatch ")
    assert all(command.startswith((*ours, *OTHERS)) for command in commands())
    scripts = {word for command in commands() for word in command.split() if word.startswith("scripts/")}
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


def test_a_shell_reads_no_bracket_of_the_table() -> None:
    assert len(readme_commands()) > 20
    for command in readme_commands():
        assert not re.search(r"[\[\]]", re.sub(r'"[^"]*"', "", command)), command


# A sweep and a print of the settings do not run a recipe here; other tests try them.
COMPOSED = [one for one in commands() + readme_commands() if not one.startswith((*OTHERS, "-m ", "--cfg "))]


@pytest.mark.parametrize("command", COMPOSED)
def test_a_command_composes_and_passes_the_checks_before_weights(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    monkeypatch.setattr(cli, "run_recipe", lambda recipe, session, reads: passed.append(session.config.task))
    monkeypatch.setattr("mtptrain.run.distributed.join", lambda config, processes: None)
    (tmp_path / "RUN").mkdir()
    given = [re.sub("=RUN$", f"={tmp_path}/RUN", one) for one in settings(command) if not one.startswith("output_dir=")]
    assert run_main(*given, Light(f"output_dir={tmp_path / 'run'}")) == 0
    assert len(passed) == 1
