"""Clusters: topology, JSON, and placement of the groups of one micro-batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Cluster, GroupKind, Node, PlanError

MIXED = Cluster((Node(6), Node(7, 2.0, 50.0), Node(4, 0.5, 80.0)))


def check_placement(cluster: Cluster, kinds: list[GroupKind], placed: list[tuple[int, ...]]) -> None:
    """Every rule of `Cluster.place`."""
    used = [rank for ranks in placed for rank in ranks]
    assert len(set(used)) == len(used)
    assert all(0 <= rank < cluster.num_ranks for rank in used)
    for kind, ranks in zip(kinds, placed, strict=True):
        assert len(ranks) == kind.degree
        assert list(ranks) == sorted(ranks)
        true = cluster.kind_at(kind, ranks)
        assert kind.spans_nodes or not true.spans_nodes
        assert true.speed >= kind.speed
        assert (true.memory_limit_bytes or math.inf) >= (kind.memory_limit_bytes or 0.0)


def powers_of_two(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most.bit_length() - 1).map(lambda power: 1 << power)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), gpus_per_node=powers_of_two(16), num_nodes=st.integers(1, 6))
def test_powers_of_two_always_fit_aligned_from_rank_0(data: st.DataObject, gpus_per_node: int, num_nodes: int) -> None:
    num_ranks = gpus_per_node * num_nodes
    degrees: list[int] = []
    while sum(degrees) < num_ranks and data.draw(st.integers(0, 9)):
        degrees.append(data.draw(powers_of_two(num_ranks - sum(degrees))))
    cluster = Cluster.uniform(num_ranks, gpus_per_node)
    kinds = [GroupKind(d, "ring", spans_nodes=d > gpus_per_node) for d in degrees]
    placed = cluster.place(kinds)
    assert placed is not None
    assert cluster.fits(kinds)
    check_placement(cluster, kinds, placed)
    start = 0
    for degree, ranks in sorted(zip(degrees, placed, strict=True), key=lambda pair: -pair[0]):
        assert ranks == tuple(range(start, start + degree))
        assert start % degree == 0
        start += degree


@settings(max_examples=300, deadline=None)
@given(
    nodes=st.lists(
        st.builds(Node, st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, 40.0, 80.0])),
        min_size=1,
        max_size=5,
    ),
    kinds=st.lists(
        st.builds(
            GroupKind,
            st.integers(1, 12),
            st.just("ring"),
            st.just("default"),
            st.booleans(),
            st.sampled_from([0.5, 0.5, 1.0, 2.0]),
            st.sampled_from([None, None, 40.0, 80.0]),
        ),
        max_size=8,
    ),
)
def test_placement_keeps_every_rule_on_irregular_clusters(nodes: list[Node], kinds: list[GroupKind]) -> None:
    cluster = Cluster(tuple(nodes))
    placed = cluster.place(kinds)
    assert cluster.fits(kinds) == (placed is not None)
    if placed is not None:
        check_placement(cluster, kinds, placed)
    if sum(kind.degree for kind in kinds) > cluster.num_ranks:
        assert placed is None


@settings(max_examples=100, deadline=None)
@given(degrees=st.lists(st.integers(1, 8), max_size=8), gpus_per_node=st.integers(1, 8))
def test_groups_that_may_span_nodes_always_fit(degrees: list[int], gpus_per_node: int) -> None:
    cluster = Cluster.uniform(max(1, sum(degrees)), gpus_per_node)
    kinds = [GroupKind(d, "ring", spans_nodes=True) for d in degrees]
    placed = cluster.place(kinds)
    assert placed is not None
    check_placement(cluster, kinds, placed)


def test_irregular_nodes_are_packed_best_fit_decreasing() -> None:
    cluster = Cluster((Node(6), Node(7)))
    kinds = [GroupKind(4, "ring"), GroupKind(3, "ring"), GroupKind(6, "ring")]
    placed = cluster.place(kinds)
    assert placed == [(6, 7, 8, 9), (10, 11, 12), (0, 1, 2, 3, 4, 5)]
    assert cluster.place([GroupKind(7, "ring"), GroupKind(7, "ring")]) is None
    assert not cluster.fits([GroupKind(5, "ring"), GroupKind(4, "ring"), GroupKind(4, "ring")])
    leftover = [GroupKind(5, "ring"), GroupKind(4, "ring"), GroupKind(4, "ring", spans_nodes=True)]
    placed = cluster.place(leftover)
    assert placed is not None
    check_placement(cluster, leftover, placed)


def test_demanding_groups_get_the_nodes_that_serve_them() -> None:
    kinds = [GroupKind(4, "ring", speed=0.5), GroupKind(4, "ring", speed=2.0), GroupKind(2, "ring", speed=2.0)]
    placed = MIXED.place(kinds)
    assert placed is not None
    check_placement(MIXED, kinds, placed)
    assert MIXED.place([GroupKind(4, "ring", speed=0.5, memory_limit_bytes=80.0)]) == [(0, 1, 2, 3)]
    assert MIXED.place([GroupKind(1, speed=4.0)]) is None
    assert MIXED.place([GroupKind(7, "ring", speed=0.5, memory_limit_bytes=60.0)]) is None
    assert not Cluster((Node(4, 1.0, 50.0),)).fits([GroupKind(1, memory_limit_bytes=60.0)])


def test_topology_of_ranks() -> None:
    assert MIXED.num_ranks == 17
    assert [MIXED.node_of_rank(rank) for rank in (0, 5, 6, 12, 13, 16)] == [0, 0, 1, 1, 2, 2]
    assert not MIXED.is_uniform
    assert MIXED.classes == ((1.0, None), (2.0, 50.0), (0.5, 80.0))
    kind = GroupKind(2, "ring", "full")
    assert MIXED.kind_at(kind, (0, 1)) == kind
    assert MIXED.kind_at(kind, (12, 13)) == GroupKind(2, "ring", "full", True, 0.5, 50.0)
    with pytest.raises(PlanError, match="rank is 17; expected 0 to 16"):
        MIXED.node_of_rank(17)


def test_uniform_clusters_have_a_partial_last_node() -> None:
    assert [node.num_gpus for node in Cluster.uniform(20, 8).nodes] == [8, 8, 4]
    assert [node.num_gpus for node in Cluster.uniform(16, 8).nodes] == [8, 8]
    assert [node.num_gpus for node in Cluster.uniform(5).nodes] == [5]
    assert Cluster.uniform(20, 8).is_uniform


def test_json_round_trip(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text(json.dumps(MIXED.to_content()))
    assert Cluster.load(tmp_path / "cluster.json") == MIXED
    assert Cluster.from_json('{"schema_version": 1, "nodes": [{"num_gpus": 8}]}') == Cluster((Node(8),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "cluster has schema_version 2"),
        ({"nodes": []}, "the cluster has no nodes"),
        ({"nodes": {}}, "cluster.nodes is {}"),
        ({"nodes": [{}]}, r"cluster.nodes\[0\] lacks the key\(s\) num_gpus"),
        ({"nodes": [{"num_gpus": 0}]}, r"cluster.nodes\[0\]: num_gpus is 0"),
        ({"nodes": [{"num_gpus": 8, "speed": 0}]}, "speed is 0.0"),
        ({"nodes": [{"num_gpus": 8, "memory_limit_bytes": -1}]}, "memory_limit_bytes is -1"),
        ({"nodes": [{"num_gpus": 8, "gpu": "H100"}]}, r"unknown key\(s\) gpu"),
        ({"racks": 1}, r"unknown key\(s\) racks"),
    ],
)
def test_malformed_cluster_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Cluster.from_json(json.dumps({**MIXED.to_content(), **change}))


def test_unreadable_cluster_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read cluster .*none\.json"):
        Cluster.load(tmp_path / "none.json")
