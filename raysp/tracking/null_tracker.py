"""Tracking that is switched off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NullTracker:
    """Takes everything ``MlflowTracker`` takes and does nothing."""

    @property
    def run_id(self) -> str | None:
        """Always ``None``."""
        return None

    @property
    def uri(self) -> str | None:
        """Always ``None``."""
        return None

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_text(self, text: str, artifact_path: str) -> None:
        """Nothing."""

    def log_artifact(self, path: str | Path, artifact_folder: str | None = None) -> None:
        """Nothing."""

    def finish(self, status: str = "FINISHED", *, timeout_s: float | None = None) -> None:
        """Nothing."""
