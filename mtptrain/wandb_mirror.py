"""W&B as a mirror of a run: what it shows lies in the run's folder too, and its failures end nothing but itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from mtptrain.config import Tracker, TrackingConfig
from mtptrain.storage import write_json

RUN_FILE = "wandb_run.json"  # the id under which a continued run is the same run to W&B


class WandbMirror:
    """One W&B run for all processes of a job, written by rank 0; begun when something is first sent to it.

    It runs offline when no key is set. The first thing that fails is told, and nothing is sent after it.

    Args:
        config: whether W&B is wanted, and how its run is called.
        output_dir: the run's folder; W&B writes into `wandb/` in it.
        settings: the resolved configuration.
    """

    def __init__(self, config: TrackingConfig, output_dir: Path, settings: dict[str, Any]) -> None:
        self.config, self.output_dir, self.settings = config, output_dir, settings
        self.is_on = config.tracker is Tracker.wandb
        self.is_offline = False
        self.run: Any = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step."""
        self._try(lambda: self.run.log(metrics, step=step), f"from step {step} on")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""

        def send() -> None:
            import wandb

            self.run.log({name: wandb.Table(columns=[*columns], data=[list(row) for row in rows])})

        self._try(send, f"before the table {name}")

    def artifact(self, name: str, kind: str, files: Sequence[Path] = (), texts: dict[str, str] | None = None) -> None:
        """Store files, folders and texts, which have a file name, as one artifact of this run."""

        def send() -> None:
            import wandb

            made = wandb.Artifact(f"{name}-{self.run.id}", type=kind)
            for path in files:
                for file in filter(Path.is_file, [path, *path.rglob("*")]):
                    made.add_file(str(file), name=str(file.relative_to(path.parent)))
            for name_inside, text in (texts or {}).items():
                with made.new_file(name_inside, mode="w") as opened:
                    opened.write(text)
            self.run.log_artifact(made)

        self._try(send, f"before the artifact {name}")

    def __enter__(self) -> WandbMirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run, as failed where the job ends with an error, and say how an offline one is uploaded."""
        if self.run is None:
            return
        exit_code, parts = int(kind is not None), self.output_dir / "wandb" / f"offline-run-*-{self.run.id}"
        self.is_on = True  # a run that broke is ended too
        self._try(lambda: self.run.finish(exit_code=exit_code), "and did not finish")
        self.run, self.is_on = None, False
        if self.is_offline:  # every restart leaves a folder of its own
            print(f"W&B ran offline; upload it with: wandb sync {parts}", file=sys.stderr)

    def _try(self, send: Callable[[], None], when: str) -> None:
        if not self.is_on:
            return
        try:
            if self.run is None:
                self.run = self._begin()
            send()
        except (Exception, SystemExit) as error:  # a tracker that fails never stops training, whatever it raises
            self.is_on = False
            print(f"W&B is off {when}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)

    def _begin(self) -> Any:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY"))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self.is_offline = mode == "offline"
        config = self.config
        return wandb.init(
            project=config.project,
            name=config.name,
            group=config.group or self.output_dir.absolute().parent.name,
            tags=config.tags,
            id=self._run_id(),
            resume=None if self.is_offline else "allow",
            dir=str(self.output_dir),
            mode=mode,
            config=self.settings,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _run_id(self) -> str:
        """The id of this run, the same after a restart."""
        path = self.output_dir / RUN_FILE
        if path.exists():
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        made = uuid4().hex[:8]
        write_json(path, {"id": made})
        return made
