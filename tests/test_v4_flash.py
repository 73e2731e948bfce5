"""docs/v4_flash.md: every command of ours composes and passes the checks that need no weights."""

import re
import shlex
from pathlib import Path

import pytest

from mtptrain import cli
from tests.command import ROOT, run_main

PAGE = ROOT / "docs" / "v4_flash.md"
OTHERS = ("hf download", "vllm serve")


def commands() -> list[str]:
    """Return the lines of all bash blocks of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def settings(command: str) -> list[str]:
    """Return the settings of a command, without its launcher."""
    return [word for word in shlex.split(command) if re.match(r"\+?[a-z_.]+=", word)]


def test_a_command_is_ours_or_one_of_two_others() -> None:
    ours = ("python -m mtptrain ", "scripts/launch_torchrun.sh ", "sbatch ")
    assert all(command.startswith((*ours, *OTHERS)) for command in commands())
    scripts = {word for command in commands() for word in command.split() if word.startswith("scripts/")}
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)


@pytest.mark.parametrize("command", [one for one in commands() if not one.startswith(OTHERS)])
def test_a_command_composes_and_passes_the_checks_before_weights(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    monkeypatch.setattr(cli, "run_recipe", lambda recipe, session, reads: passed.append(session.config.task))
    monkeypatch.setattr("mtptrain.run.distributed.join", lambda config, processes: None)
    given = [one for one in settings(command) if not one.startswith("output_dir=")]
    assert run_main(*given, f"output_dir={tmp_path / 'run'}") == 0
    assert len(passed) == 1
