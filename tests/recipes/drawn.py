"""Draw the pages of light runs, whose plots were left empty (`tests/light.py`)."""

from pathlib import Path

from tests.command import run_main


def check_drawn(folder: Path, page: str, count: int) -> None:
    """A page whose plots were only sketched can be drawn from its result, with so many plots or more."""
    redrawn = folder.with_name(f"{folder.name}-redrawn")
    assert run_main("+recipe=report", f"path={folder}", f"output_dir={redrawn}") == 0
    drawn = (redrawn / page).read_text(encoding="utf-8").split("<svg ")[1:]
    assert len(drawn) >= count
    assert all("<path" in plot for plot in drawn)
