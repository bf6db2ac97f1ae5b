"""Which links are measured at a time, and what a measurement predicts."""

from __future__ import annotations

import pytest

from raysp.comm import Communicator, LinkMeasurement, measure_link
from raysp.comm.links import ring_pairs, rounds_of_pairs
from raysp.errors import InputError


@pytest.mark.parametrize(
    ("degree", "expected"),
    [
        (2, ((0, 1),)),
        (3, ((0, 1), (1, 2), (0, 2))),
        (4, ((0, 1), (1, 2), (2, 3), (0, 3))),
    ],
)
def test_ring_names_each_pair_once(degree: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert ring_pairs(degree) == expected


@pytest.mark.parametrize("degree", [2, 3, 4, 5, 8, 63, 64])
def test_pairs_of_a_round_share_no_rank(degree: int) -> None:
    pairs = ring_pairs(degree)
    rounds = rounds_of_pairs(pairs)
    assert sorted(index for indices in rounds for index in indices) == list(range(len(pairs)))
    assert len(rounds) <= 3
    for indices in rounds:
        ranks = [rank for index in indices for rank in pairs[index]]
        assert len(ranks) == len(set(ranks))


def test_pairs_of_a_round_share_no_network_of_a_node() -> None:
    nodes = [f"node {rank // 4}" for rank in range(32)]
    pairs = ring_pairs(32)
    rounds = rounds_of_pairs(pairs, nodes)
    assert len(rounds) <= 4
    for indices in rounds:
        used = [nodes[r] for i in indices for r in pairs[i] if nodes[pairs[i][0]] != nodes[pairs[i][1]]]
        assert len(used) == len(set(used))


def test_exchange_time_is_latency_and_bytes_over_bandwidth() -> None:
    link = LinkMeasurement(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
    assert link.exchange_time_s(2e6) == pytest.approx(2.1e-3)


def test_a_rank_alone_has_no_link() -> None:
    with pytest.raises(InputError, match="at least two ranks"):
        measure_link(Communicator.alone(), device="cpu")
