"""Exports through the command line that must succeed."""

import json
from pathlib import Path
from typing import Any

from mtptrain.training.checkpoint import EXPORT_MANIFEST
from tests.command import Light, run_main

FAST = [Light("export.max_drop=1")]  # two training steps change little, and two prompts are too few to measure it


def read_record(folder: Path) -> dict[str, Any]:
    """Return the manifest's facts about the head and about the export."""
    record: dict[str, Any] = json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))
    return {**record["identity"], **record["content"]}


def export(settings: list[str], folder: Path, *arguments: str) -> dict[str, Any]:
    """Run an export that must succeed, and return its record."""
    assert run_main("+recipe=export", *settings, f"output_dir={folder}", *arguments) == 0
    return read_record(folder)
