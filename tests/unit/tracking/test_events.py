"""Events of drift and refit: what a person reads, and what becomes a metric."""

from __future__ import annotations

import dataclasses
import io
import json

from rich.console import Console

from raysp.tracking.console import ConsoleReporter
from raysp.tracking.events import CostModelRefitted, LengthsDrifted, LinksMeasured, MeasuredLink, StepFinished

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


def _link(ranks: tuple[int, int], rate: float, crosses_nodes: bool) -> MeasuredLink:
    addresses = ("10.0.0.4", "10.0.0.5" if crosses_nodes else "10.0.0.4")
    return MeasuredLink(ranks, addresses, crosses_nodes, rate, 2e-5)


def _printed(event: LinksMeasured) -> str:
    out = io.StringIO()
    ConsoleReporter(Console(file=out, width=200)).handle(event)
    return out.getvalue().strip()


def test_links_of_one_node_are_one_line() -> None:
    links = tuple(_link(ranks, rate, False) for ranks, rate in (((0, 1), 2e9), ((1, 2), 3e9), ((0, 2), 4e9)))
    assert (
        _printed(LinksMeasured(0, links)) == "• links: 3.0 GB/s between workers, slowest 2.0 GB/s between ranks 0 and 1"
    )
    assert _printed(LinksMeasured(0, links[:1])) == "• links: 2.0 GB/s between workers"
    assert LinksMeasured(0, links).metrics() == {
        "link_bandwidth_inside_nodes_bytes_per_s": 3e9,
        "link_slowest_inside_nodes_bytes_per_s": 2e9,
        "link_latency_inside_nodes_s": 2e-5,
    }


def test_links_of_several_nodes_are_one_line_that_names_nodes() -> None:
    links = (_link((0, 1), 250e9, False), _link((1, 2), 24.1e9, True), _link((3, 4), 30e6, True))
    event = LinksMeasured(0, links)
    assert _printed(event) == (
        "• links: 250.0 GB/s inside nodes, 12.1 GB/s between nodes, slowest 30.0 MB/s between rank 3 (node 10.0.0.4) and "
        "rank 4 (node 10.0.0.5)"
    )
    assert event.metrics()["link_slowest_between_nodes_bytes_per_s"] == 30e6
    assert len(json.loads(event.to_json())) == 3
