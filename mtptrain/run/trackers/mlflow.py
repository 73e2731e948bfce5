"""MLflow: a database in the run's folder, or the server at MLFLOW_TRACKING_URI.

Source: https://mlflow.org/docs/latest/ml/tracking/tracking-api
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtptrain.config.verbosity import print_status
from mtptrain.run.storage import write_json
from mtptrain.run.trackers import TrackedRun, unlogged

if TYPE_CHECKING:
    from mlflow import MlflowClient

PACKAGES = ("mlflow", "sqlalchemy")  # mlflow-skinny lacks the latter and cannot write a database
RUN_FILE = "mlflow_run.json"  # MLflow's id of the run, so that a resumed run continues it
DATABASE, ARTIFACTS = "mlflow.db", "mlflow_artifacts"
MAX_PARAMETERS = 100  # per call
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # By default MLflow retries for a quarter of an hour while the other processes of the job wait.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class MlflowTracker:
    """An MLflow run.

    Args:
        client: of the store that holds the run.
        run_id: of the run.
        local_store: URI of the store if it is in the run's folder, otherwise None.
        ends_run: whether the run ends with this process.
    """

    def __init__(self, client: MlflowClient, run_id: str, local_store: str | None, ends_run: bool = True) -> None:
        self.client, self.run_id, self.local_store, self.ends_run = client, run_id, local_store, ends_run
        self.logged_steps = {
            name: max(point.step for point in client.get_metric_history(run_id, name))
            for name in client.get_run(run_id).data.metrics
        }

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step, except those that MLflow has: it only appends and would show them twice."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = unlogged(step, metrics, self.logged_steps)
        self.client.log_batch(self.run_id, [Metric(name, float(value), now, step) for name, value in fresh.items()])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Store a table; replace a table of the same name."""
        file = f"{name}.json"
        stored = {one.path for one in self.client.list_artifacts(self.run_id, str(Path(file).parent))}
        if file in stored:  # `log_table` would append to it
            self.client.log_dict(self.run_id, {"columns": [*columns], "data": [list(row) for row in rows]}, file)
        else:
            by_column = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
            self.client.log_table(self.run_id, by_column, file)

    def artifact(self, name: str, kind: str, files: Sequence[Path], texts: Mapping[str, str]) -> None:
        """Store files, folders and texts below a folder called `name`."""
        for path in files:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), f"{name}/{path.name}")
            else:
                self.client.log_artifact(self.run_id, str(path), name)
        for file_name, text in texts.items():
            self.client.log_text(self.run_id, text, f"{name}/{file_name}")

    def finish(self, failed: bool) -> None:
        """End the run and print the command that shows a local one."""
        if self.ends_run:
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")
        if self.local_store is not None:
            print_status(f"show the run with: mlflow ui --backend-store-uri {self.local_store}")


def begin(run: TrackedRun) -> MlflowTracker:
    """Start an MLflow run, or continue the one whose id is in the run's folder."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # otherwise it reports every table of a new database
    server = os.environ.get("MLFLOW_TRACKING_URI")
    local_store = None if server else f"sqlite:///{run.folder.absolute() / DATABASE}"
    client, path = MlflowClient(tracking_uri=server or local_store), run.folder / RUN_FILE
    if path.exists():
        run_id = str(json.loads(path.read_text(encoding="utf-8"))["id"])
        if run.beside is None:
            client.update_run(run_id, status="RUNNING")
    else:
        run_id = _create_run(client, run, None if server else (run.folder / ARTIFACTS).absolute().as_uri())
        write_json(path, {"id": run_id})
    return MlflowTracker(client, run_id, local_store, ends_run=run.beside is None)


def _create_run(client: MlflowClient, run: TrackedRun, artifacts: str | None) -> str:
    """Create a run with its tags and settings; return its id."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    project = run.config.project
    if client.get_experiment_by_name(project) is None:
        with suppress(MlflowException):  # another job of a sweep has just created it
            client.create_experiment(project, artifact_location=artifacts)
    experiment = client.get_experiment_by_name(project)
    tags = {"group": run.group, **dict.fromkeys(run.config.tags, "true")}
    created = client.create_run(experiment.experiment_id, tags=tags, run_name=run.config.name)
    run_id = str(created.info.run_id)
    parameters = [Param(name, str(value)) for name, value in _flat(run.settings)]
    for first in range(0, len(parameters), MAX_PARAMETERS):
        client.log_batch(run_id, params=parameters[first : first + MAX_PARAMETERS])
    return run_id


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting with its dotted name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
