"""A head that was trained for two steps on a miniature release, and its export."""

from pathlib import Path

import pytest

from tests.command import Light, run_main
from tests.export.exporting import FAST, export


@pytest.fixture(scope="session")
def settings(light: list[str], release_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return all settings of an export except its target and folder."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    arguments = [*light, f"backbone.path={release_folder}", "mtp.steps=3", "evaluate_at_end=false"]
    assert run_main("+recipe=distill", *arguments, f"output_dir={run}") == 0
    return [*light, *FAST, f"backbone.path={release_folder}", Light(f"checkpoint={run}")]


@pytest.fixture(scope="session")
def exported(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "full"
    export(settings, folder, "target=vllm")
    return folder
