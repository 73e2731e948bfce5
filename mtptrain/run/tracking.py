"""Metrics of a run: `metrics.jsonl` is the record, and trackers show it. A failure of either never stops the run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mtptrain.run.storage import write_text
from mtptrain.run.trackers import TrackedRun, Tracker, begin_tracker

METRICS_FILE = "metrics.jsonl"


class _GuardedTracker:
    """A tracker that starts at its first call and is turned off by its first failure."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name, self.run = name, run
        self.tracker: Tracker | None = None
        self.is_on = True

    def send(self, call: Callable[[Tracker], None], when: str) -> None:
        """Make one call; if it fails, print one line. `when` describes the part of the run that the tracker misses."""
        if not self.is_on:
            return
        try:
            if self.tracker is None:
                self.tracker = begin_tracker(self.name, self.run)
            call(self.tracker)
        except (Exception, SystemExit) as error:  # packages of trackers raise either
            self.is_on = False
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{self.name} is off {when}: {reason}", file=sys.stderr)

    def finish(self, failed: bool) -> None:
        """End the tracker's run if it was started, even after a failure."""
        if self.tracker is not None:
            self.is_on = True
            self.send(lambda tracker: tracker.finish(failed), "and did not finish")
        self.tracker, self.is_on = None, False


class Trackers:
    """All trackers of a run as one. A context manager that finishes them; only rank 0 has any.

    Nothing is sent or written before the first call. A tracker that fails prints one line and gets no further calls.

    Args:
        run: its configuration selects the trackers; None for no trackers.
    """

    def __init__(self, run: TrackedRun | None = None) -> None:
        self.run = run
        self.trackers = [_GuardedTracker(name, run) for name in run.config.chosen] if run is not None else []

    @property
    def is_on(self) -> bool:
        """Return whether any tracker still gets calls."""
        return any(tracker.is_on for tracker in self.trackers)

    def start_from(self, step: int, last_step: int | None) -> None:
        """Set the step at which training starts or continues; call it before anything is sent.

        Args:
            step: the number of steps done.
            last_step: the last step that an interrupted process has logged.
        """
        if self.run is not None:
            self.run.start_step, self.run.last_step = step, last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._send(lambda tracker: tracker.log(step, metrics), f"from step {step} on")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        self._send(lambda tracker: tracker.table(name, columns, rows), f"before the table {name}")

    def artifact(
        self, name: str, kind: str, files: Sequence[Path] = (), texts: Mapping[str, str] | None = None
    ) -> None:
        """Send files, folders and texts (by file name) as one artifact; `kind` is `evaluation` or `model`."""
        self._send(lambda tracker: tracker.artifact(name, kind, files, texts or {}), f"before the artifact {name}")

    def _send(self, call: Callable[[Tracker], None], when: str) -> None:
        for tracker in self.trackers:
            tracker.send(call, when)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the run in every tracker, as failed if the block ends with an error."""
        for tracker in self.trackers:
            tracker.finish(kind is not None)


class MetricsLog:
    """Writes one row of metrics per call and flushes it. If the disk fails, the log ends and training continues.

    Args:
        folder: for metrics.jsonl; None writes no file.
        trackers: receive the same rows.
        start_step: rows that an interrupted run wrote after this step are dropped.
    """

    def __init__(self, folder: Path | None, trackers: Trackers, start_step: int = 0) -> None:
        self.trackers = trackers
        self.file: TextIO | None = None
        last_step = None
        if folder is not None:
            last_step = _last_step(folder / METRICS_FILE)
            self.file = _open(folder / METRICS_FILE, start_step)
        trackers.start_from(start_step, last_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step; NaN and infinity become null in the file, since JSON has neither."""
        if self.file is not None:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            try:
                self.file.write(json.dumps({"step": step, **row}) + "\n")
                self.file.flush()
            except OSError as error:
                print(f"{METRICS_FILE} ends before step {step}: {error.strerror}", file=sys.stderr)
                self.file = None
        self.trackers.log(step, metrics)

    def close(self) -> None:
        """Close the file; trackers stay open for the evaluation after training."""
        if self.file is not None:
            self.file.close()


def _open(path: Path, start_step: int) -> TextIO | None:
    """Open the log without rows after `start_step`; return None, with a warning, if it cannot be opened."""
    try:
        if path.exists():
            _keep_until(path, start_step)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); training goes on without it", file=sys.stderr)
        return None


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows that an interrupted run wrote after its last checkpoint, at `step`."""
    kept = [json.dumps(row) for row in read_rows(path) if row.get("step", 0) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _last_step(path: Path) -> int | None:
    """Return the step of the last row; None if there is no row that can be read."""
    try:
        return max((row.get("step", 0) for row in read_rows(path)), default=None)
    except OSError:
        return None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log without lines that are none, such as the last one of a run that writes it or was killed.

    A run with `tracking.metrics_file=false` has no log, and no rows.

    Raises:
        OSError: the file exists and cannot be read.
    """
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            if isinstance(row := json.loads(line), dict):
                yield row
