"""One MLflow run, written synchronously; every call may block or raise. ``mlflow_tracker`` keeps that off training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from raysp.tracking.names import sqlite_path, valid_name

# MLflow's limits of one log_batch request.
_MAX_METRICS = 1000
_MAX_PARAMS_OR_TAGS = 100
# MLflow's defaults keep a request to a dead server going for minutes, and print. What the user has set stays.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_ARTIFACT_ROOT_VARIABLE = "_MLFLOW_SERVER_ARTIFACT_ROOT"


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; ``time_s`` since 1970."""

    name: str
    value: float
    step: int
    time_s: float


@contextmanager
def quiet_bounded_requests() -> Iterator[None]:
    """Limit retries and time-outs of MLflow's HTTP requests inside the block, and keep it from printing and reporting.

    MLflow reads such settings from the environment of the process only, so they are put back at the end.
    """
    with _environment(_SETTINGS):
        yield


class MlflowRun:
    """A run that is open for writing. Make one with ``MlflowRun.open``."""

    def __init__(self, client: Any, run_id: str, known_params: Mapping[str, str]) -> None:
        self._client = client
        self._params = dict(known_params)
        self.run_id = run_id

    @classmethod
    def open(
        cls, *, uri: str, experiment: str, run_name: str | None, run_id: str | None, tags: Mapping[str, str]
    ) -> MlflowRun:
        """Create a run, or continue the one named ``run_id``.

        The folder of an SQLite database is made, and a new experiment keeps its artifacts in ``mlartifacts`` beside it.
        """
        database = sqlite_path(uri)
        artifacts = None
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (database.parent / "mlartifacts").as_uri()
        # Without this the SQL store makes an empty ./mlruns.
        with _environment({_ARTIFACT_ROOT_VARIABLE: artifacts} if artifacts else {}):
            _quiet_migrations()
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            if run_id is not None:
                run = client.get_run(run_id)
                client.update_run(run_id, status="RUNNING")
            else:
                experiment_id = _experiment_id(client, experiment, artifacts)
                run = client.create_run(experiment_id, run_name=run_name)
        opened = cls(client, run.info.run_id, run.data.params)
        opened.log_tags(tags)
        return opened

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Write values, as few requests as MLflow allows."""
        from mlflow.entities import Metric

        metrics = [Metric(valid_name(p.name), p.value, int(p.time_s * 1000), p.step) for p in points]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write parameters; they are immutable, so one that has another value becomes the tag ``changed.NAME``."""
        from mlflow.entities import Param

        values = {valid_name(name): str(value) for name, value in params.items()}
        new = {name: value for name, value in values.items() if name not in self._params}
        changed = {n: value for n, value in values.items() if n in self._params and self._params[n] != value}
        for chunk in _chunks(new):
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in chunk])
            self._params.update(chunk)
        self.log_tags({f"changed.{name}": value for name, value in changed.items()})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Write tags; they may be written again."""
        from mlflow.entities import RunTag

        for chunk in _chunks({valid_name(name): str(value) for name, value in tags.items()}):
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in chunk])

    def log_text(self, text: str, artifact_path: str) -> None:
        """Write a text as an artifact."""
        self._client.log_text(self.run_id, text, artifact_path)

    def log_artifact(self, path: str, artifact_folder: str | None) -> None:
        """Copy a file, or a folder with what it holds, to the artifacts."""
        if os.path.isdir(path):
            self._client.log_artifacts(self.run_id, path, artifact_folder)
        else:
            self._client.log_artifact(self.run_id, path, artifact_folder)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def _experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except Exception:
            # Another run made it in between; anything else is raised again.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _chunks(values: Mapping[str, str]) -> Iterator[list[tuple[str, str]]]:
    items = iter(values.items())
    while chunk := list(islice(items, _MAX_PARAMS_OR_TAGS)):
        yield chunk


def _quiet_migrations() -> None:
    # A new SQLite database prints some hundred lines about its tables.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
