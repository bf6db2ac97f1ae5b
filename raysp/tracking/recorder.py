"""One place that every event of a run passes: shown to whoever listens, and written to MLflow."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

from raysp.config import Config
from raysp.tracking.events import (
    BatchCompared,
    CostModelRefitted,
    Event,
    LinksMeasured,
    StepFinished,
    ValidationFinished,
    WarningRaised,
)
from raysp.tracking.mlflow_tracker import MlflowTracker
from raysp.tracking.null_tracker import NullTracker


class RunRecorder:
    """Passes events on and logs them.

    Args:
        config: The resolved configuration.
        run_id: MLflow run to continue.
        on_event: Told every event, from the caller's thread.
    """

    def __init__(self, config: Config, *, run_id: str | None, on_event: Callable[[Event], None]) -> None:
        self._config = config
        self._on_event = on_event
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._tracker: MlflowTracker | NullTracker = NullTracker()
        if config.tracking.enabled:
            self._tracker = MlflowTracker(
                uri=config.tracking.uri,
                experiment=config.tracking.experiment,
                run_name=config.tracking.run_name,
                run_id=run_id,
                on_warning=self._warnings.put,
            )

    @property
    def run_id(self) -> str | None:
        """MLflow run id; ``None`` when tracking is off or the server cannot be reached."""
        return self._tracker.run_id

    @property
    def uri(self) -> str | None:
        """Tracking URI; ``None`` when tracking is off."""
        return self._tracker.uri

    def start(self, *, facts: Mapping[str, Any], documents: Mapping[str, str]) -> None:
        """Log the resolved configuration and what is known once the workers run.

        Args:
            facts: Parameters beside the configuration (device, model size ...).
            documents: Artifact path -> text.
        """
        self._tracker.log_params({**_flat(self._config.model_dump(mode="json")), **facts})
        self._tracker.log_text(self._config.to_json(), "config.json")
        for path, text in documents.items():
            self._tracker.log_text(text, path)

    def handle(self, event: Event) -> None:
        """Show an event and log its metrics."""
        self._pass_warnings_on()
        self._on_event(event)
        match event:
            case StepFinished():
                self._tracker.log_metrics(event.step, event.metrics())
            case LinksMeasured():
                self._tracker.log_metrics(event.step, event.metrics())
                self._tracker.log_text(event.to_json(), "links.json")
            case ValidationFinished():
                self._tracker.log_metrics(event.step, {"validation_loss": event.loss})
            case CostModelRefitted():
                self._tracker.log_metrics(event.step, {"cost_model_error": event.mean_relative_error})
            case BatchCompared():
                ratio = event.other.measured_time_s / event.run.measured_time_s
                self._tracker.log_metrics(
                    event.batch,
                    {
                        "compare_run_time_s": event.run.measured_time_s,
                        "compare_other_time_s": event.other.measured_time_s,
                        "compare_speed_up": ratio,
                    },
                )
            case _:
                pass

    def log_plan(self, step: int, plan_json: str) -> None:
        """Keep the plan of a step as an artifact."""
        self._tracker.log_text(plan_json, f"plans/step-{step:08d}.json")

    def log_cost_model(self, step: int, cost_model_json: str) -> None:
        """Keep a cost model that plans use after ``step`` steps as an artifact; plans name it by its hash."""
        self._tracker.log_text(cost_model_json, f"cost_models/step-{step:08d}.json")

    def finish(self, status: str) -> None:
        """Flush, and close the MLflow run as FINISHED, FAILED or KILLED."""
        self._tracker.finish(status)
        self._pass_warnings_on()

    def _pass_warnings_on(self) -> None:
        while True:
            try:
                text = self._warnings.get_nowait()
            except queue.Empty:
                return
            self._on_event(WarningRaised(text))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
