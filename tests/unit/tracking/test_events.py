"""Events of drift and refit: what a person reads, and what becomes a metric."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from raysp.tracking.console import ConsoleReporter
from raysp.tracking.events import CostModelRefitted, LengthsDrifted, StepFinished

_STEP = StepFinished(
    step=3,
    num_steps=9,
    loss=1.0,
    grad_norm=1.0,
    learning_rate=1e-3,
    num_sequences=2,
    num_tokens=10,
    num_ranks=1,
    step_time_s=2.0,
    predicted_step_time_s=2.0,
    plan_time_s=0.1,
    plan_wait_s=0.0,
    plan_gap=0.0,
    outcome="optimal",
    peak_memory_bytes=0,
    mfu=None,
    micro_batches=(),
)


def test_length_drift_is_a_metric_where_it_was_measured() -> None:
    assert "length_drift" not in _STEP.metrics()
    assert dataclasses.replace(_STEP, length_drift=0.25).metrics()["length_drift"] == 0.25


def test_drift_and_refit_are_one_line_each() -> None:
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=200))
    reporter.handle(LengthsDrifted(step=7, text="lengths drifted: median 90 tokens instead of 300"))
    reporter.handle(
        CostModelRefitted(step=8, sha256="0123456789abcdef", mean_relative_error=0.05, text="from 40.0% to 5.0%")
    )
    assert out.getvalue().splitlines() == [
        "  batch of step 7: lengths drifted: median 90 tokens instead of 300",
        "  cost model 0123456789ab from step 8 on: from 40.0% to 5.0%",
    ]
