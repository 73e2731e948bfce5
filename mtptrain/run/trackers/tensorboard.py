"""TensorBoard: event files in the run's folder. It shows curves and tables and lists the paths of artifacts.

Source: https://docs.pytorch.org/docs/stable/tensorboard.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mtptrain.config.verbosity import print_status
from mtptrain.run.trackers import TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("tensorboard",)
FOLDER, BESIDE = "tensorboard", "watch"  # TensorBoard reads one growing file a folder, so a watch has one below it


class TensorBoardTracker:
    """A folder of event files.

    Args:
        writer: of the folder.
        step: the last step that was logged.
    """

    def __init__(self, writer: SummaryWriter, step: int) -> None:
        self.writer, self.step = writer, step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a point of each metric's curve."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        self.step = max(self.step, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))

    def artifact(self, name: str, kind: str, files: Sequence[Path], texts: Mapping[str, str]) -> None:
        """Show the paths of the files; TensorBoard stores no files."""
        if files:
            self._text(f"{name}/files", "\n".join(f"- `{path.absolute()}`" for path in files))

    def finish(self, failed: bool) -> None:
        """Close the event file."""
        self.writer.close()

    def _text(self, name: str, text: str) -> None:
        # One step after training, so that a resumed run purges the text and writes it again.
        self.writer.add_text(name, text, self.step + 1)
        self.writer.flush()


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def begin(run: TrackedRun) -> TensorBoardTracker:
    """Open an event file that hides the steps after `run.start_step` of earlier event files in the folder."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / FOLDER if run.beside is None else run.folder / FOLDER / BESIDE
    is_new = not folder.exists()
    print_status(f"watch the run with: tensorboard --logdir {run.folder / FOLDER}")
    purge_step = None if run.start_step is None else run.start_step + 1
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    if is_new:
        writer.add_text("settings", f"```yaml\n{yaml.safe_dump(run.settings, sort_keys=False)}```", 0)
    return TensorBoardTracker(writer, run.start_step or 0)
