"""MLflow that can neither stop nor slow training: a bounded queue and one daemon thread that empties it.

Whatever fails there (no server, no disk, no mlflow) becomes one warning. While the run cannot be opened, the thread
tries again from time to time and the newest records wait in the queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysp.errors import first_line
from raysp.tracking.mlflow_run import MetricPoint, MlflowRun, quiet_bounded_requests
from raysp.tracking.names import resolve_uri

_MAX_METRICS_AT_ONCE = 1000
# A first SQLite database takes 7 s on an idle machine and more beside training.
_START_S = 60.0
_FLUSH_S = 30.0
# How requests and urllib3 say it, in several lines of nested errors.
_NO_SERVER_SIGNS = ("Max retries exceeded", "Connection refused", "Failed to establish a new connection")
_STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True, slots=True)
class _Metrics:
    points: tuple[MetricPoint, ...]


@dataclass(frozen=True, slots=True)
class _Write:
    write: Callable[[MlflowRun], None]


class MlflowTracker:
    """Logs to one MLflow run in the background. No method waits for MLflow except ``run_id`` and ``finish``, boundedly.

    Args:
        uri: Tracking URI; none is ``mlflow.db`` in the working directory. A relative SQLite path becomes absolute.
        experiment: Made if it does not exist.
        run_name: For people; none lets MLflow choose.
        run_id: Run to continue; it is RUNNING again.
        tags: Written first.
        params: Written first.
        retry_open_s: Wait before another attempt to open the run.
        max_queued: Calls kept while MLflow is slow or away; beyond, the oldest are lost, with a warning at the end.
        on_warning: Told about trouble, once for an unreachable MLflow, from the background thread. Must not raise.
    """

    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        run_name: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        retry_open_s: float = 30.0,
        max_queued: int = 10_000,
        on_warning: Callable[[str], Any],
    ) -> None:
        self._uri = resolve_uri(uri, folder=Path.cwd())
        self._experiment = experiment
        self._run_name = run_name
        self._wanted_run_id = run_id
        self._tags = dict(tags or {})
        self._retry_open_s = retry_open_s
        self._max_queued = max_queued
        self._on_warning = on_warning
        self._run_id: str | None = None
        self._first_attempt_ended = threading.Event()
        self._waited = False
        self._records: deque[_Metrics | _Write] = deque()
        self._changed = threading.Condition()
        self._status: str | None = None
        self._num_dropped = 0
        self._warned = False
        if params:
            self.log_params(params)
        self._thread = threading.Thread(target=self._work, name="raysp-mlflow", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """The tracking URI, SQLite paths absolute."""
        return self._uri

    @property
    def run_id(self) -> str | None:
        """Id of the run; the first call waits for it, 60 s at most. ``None``: it is not open (yet)."""
        if not self._waited:
            self._first_attempt_ended.wait(_START_S)
            self._waited = True
        return self._run_id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log values of one step, with the time of this call."""
        now_s = time.time()
        self._put(_Metrics(tuple(MetricPoint(name, float(value), step, now_s) for name, value in metrics.items())))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters as text; a value that differs from the one of a continued run becomes a tag."""
        values = dict(params)
        self._put(_Write(lambda run: run.log_params(values)))

    def log_text(self, text: str, artifact_path: str) -> None:
        """Log a text as the artifact ``artifact_path`` (with ``/``)."""
        self._put(_Write(lambda run: run.log_text(text, artifact_path)))

    def log_artifact(self, path: str | Path, artifact_folder: str | None = None) -> None:
        """Copy a file or folder to the artifacts; it must stay as it is until ``finish``."""
        local = str(Path(path).absolute())
        self._put(_Write(lambda run: run.log_artifact(local, artifact_folder)))

    def finish(self, status: str = "FINISHED", *, timeout_s: float | None = None) -> None:
        """Write what waits and end the run. Further calls do nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: Longest wait, default 30; what is not written by then is lost, with a warning.

        Raises:
            ValueError: Another status.
        """
        if status not in _STATUSES:
            raise ValueError(f"status is {status!r}; expected one of {', '.join(_STATUSES)}.")
        with self._changed:
            if self._status is not None:
                return
            self._status = status
            self._changed.notify_all()
        self._thread.join(_FLUSH_S if timeout_s is None else timeout_s)
        if self._thread.is_alive():
            self._warn(
                f"MLflow at {self._uri} did not take the last {len(self._records)} records in time; they are lost."
            )

    def _put(self, record: _Metrics | _Write) -> None:
        with self._changed:
            if self._status is not None:
                return
            if len(self._records) >= self._max_queued:
                self._records.popleft()
                self._num_dropped += 1
            self._records.append(record)
            self._changed.notify_all()

    def _work(self) -> None:
        with quiet_bounded_requests():
            run = self._open()
            if run is None:
                return
            while True:
                record = self._next()
                if record is None:
                    break
                self._attempt(run, record)
            if self._num_dropped:
                self._on_warning(f"MLflow at {self._uri} was too slow; {self._num_dropped} records are lost.")
            self._attempt(run, _Write(lambda opened: opened.close(self._status or "FINISHED")))

    def _open(self) -> MlflowRun | None:
        while True:
            try:
                run = MlflowRun.open(
                    uri=self._uri,
                    experiment=self._experiment,
                    run_name=self._run_name,
                    run_id=self._wanted_run_id,
                    tags=self._tags,
                )
            except Exception as error:  # MLflow, SQLAlchemy, requests and the disk each raise their own
                self._warn(self._trouble(error))
            else:
                self._run_id = run.run_id
                return run
            finally:
                self._first_attempt_ended.set()
            with self._changed:
                self._changed.wait_for(lambda: self._status is not None, timeout=self._retry_open_s)
                if self._status is not None:
                    return None

    def _next(self) -> _Metrics | _Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._records or self._status is not None)
            if not self._records:
                return None
            record = self._records.popleft()
            if not isinstance(record, _Metrics):
                return record
            points = list(record.points)
            while self._records and isinstance(self._records[0], _Metrics) and len(points) < _MAX_METRICS_AT_ONCE:
                points += self._records.popleft().points  # type: ignore[union-attr]
            return _Metrics(tuple(points))

    def _attempt(self, run: MlflowRun, record: _Metrics | _Write) -> None:
        try:
            if isinstance(record, _Metrics):
                run.log_metrics(record.points)
            else:
                record.write(run)
        except Exception as error:  # as in _open
            self._warn(self._trouble(error))

    def _trouble(self, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError):
            reason = f"{error.name} is not installed; pip install 'raysp[train]'"
        else:
            reason = first_line(error)[:300]
            if any(sign in reason for sign in _NO_SERVER_SIGNS):
                reason = "no server answers there"
        return (
            f"MLflow at {self._uri} cannot be written: {reason.rstrip('.')}. Training goes on without it; correct "
            "tracking.uri, or set tracking.enabled = false."
        )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)
