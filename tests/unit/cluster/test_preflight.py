"""Which links stand for all, which are slow, and what is said about them."""

from __future__ import annotations

from typing import Any

import pytest

from raysp.cluster.preflight import better_of, neighbour_pairs, preflight, slow_link_text, slow_links
from raysp.cluster.worker import WorkerInfo
from raysp.comm import LinkMeasurement, PairMeasurement
from raysp.tracking.events import MeasuredLink
from raysp.train.session import ModelSize


def _link(bandwidth: float, ranks: tuple[int, int] = (0, 1), crosses_nodes: bool = False) -> MeasuredLink:
    return MeasuredLink(ranks, ("10.0.0.4", "10.0.0.5"), crosses_nodes, bandwidth, 1e-5)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("aa", ((0, 1),)),
        ("aabb", ((0, 1), (1, 2), (2, 3), (0, 3))),
        ("abab", ((0, 1), (1, 2), (2, 3), (0, 3), (0, 2), (1, 3))),
    ],
)
def test_pairs_cover_neighbours_and_the_inside_of_every_node(nodes: str, expected: tuple[tuple[int, int], ...]) -> None:
    assert neighbour_pairs(list(nodes)) == expected


def test_slow_is_below_half_of_the_median_of_its_kind() -> None:
    inside = [_link(200e9), _link(210e9), _link(99e9)]
    between = [_link(24e9, crosses_nodes=True), _link(20e9, crosses_nodes=True), _link(2.1e9, (3, 4), True)]
    assert slow_links([*inside, *between], inside_nodes=True) == [(inside[2], 200e9), (between[2], 20e9)]
    assert slow_links([*inside, *between], inside_nodes=False) == [(between[2], 20e9)]
    assert slow_links(between[:1], inside_nodes=True) == []


def test_slow_link_is_named_with_its_nodes_and_what_to_do() -> None:
    text = slow_link_text(_link(2.1e9, (3, 4), True), 24.1e9)
    assert "between rank 3 (node 10.0.0.4) and rank 4 (node 10.0.0.5) carries 2.1 GB/s" in text
    assert "the median between nodes is 24.1 GB/s" in text
    assert "NCCL_SOCKET_IFNAME" in text
    assert "nvidia-smi topo -m" in slow_link_text(_link(1e9), 3e9)


def test_better_of_two_measurements_counts() -> None:
    assert better_of([_link(1.0), _link(5.0)], [_link(2.0), _link(4.0)]) == (_link(2.0), _link(5.0))


class _Workers:
    """Three workers of one node that answer with given bandwidths, one list per call."""

    size = 3

    def __init__(self, *answers: list[float], device_memory_bytes: int = 1) -> None:
        self.answers = list(answers)
        size = ModelSize(1, 0, 1, 1, 1, 1, 1, 1)
        self.infos = [
            WorkerInfo(
                global_rank=rank,
                node_id="a",
                node_address="10.0.0.4",
                pid=rank,
                device_name="test",
                device_memory_bytes=device_memory_bytes,
                model_size=size,
            )
            for rank in range(3)
        ]

    def call_same(self, method: str, *arguments: Any, timeout_s: float, what: str) -> list[Any]:
        pairs = arguments[0]
        measured = [
            PairMeasurement(pair, LinkMeasurement(rate, 1e-5))
            for pair, rate in zip(pairs, self.answers.pop(0), strict=True)
        ]
        return [tuple(measured)] * self.size


def _preflight(workers: _Workers) -> tuple[list[float], list[str]]:
    event, warnings = preflight(workers, step=7)  # type: ignore[arg-type]
    assert event.step == 7
    assert workers.answers == []
    return [link.bandwidth_bytes_per_s for link in event.links], warnings


def test_link_that_was_slow_once_is_measured_again() -> None:
    assert _preflight(_Workers([1e9, 4e9, 4e9], [4.1e9, 3e9, 4e9])) == ([4.1e9, 4e9, 4e9], [])


def test_link_that_stays_slow_is_warned_about() -> None:
    _, warnings = _preflight(_Workers([1e9, 4e9, 4e9], [1.1e9, 3e9, 4e9]))
    assert len(warnings) == 1
    assert "the link between rank 0 (node 10.0.0.4) and rank 1 (node 10.0.0.4) carries 1.1 GB/s" in warnings[0]


def test_links_that_are_alike_are_measured_once() -> None:
    assert _preflight(_Workers([4e9, 4e9, 4e9])) == ([4e9, 4e9, 4e9], [])


def test_memory_between_cpu_workers_is_no_slow_link() -> None:
    assert _preflight(_Workers([1e9, 4e9, 4e9], device_memory_bytes=0)) == ([1e9, 4e9, 4e9], [])
