"""Parallel attention on networks of 1 to some hundred ranks: an alpha-beta model of each link.

A message goes over the links of its route. Messages that start together end when the last link is done: its bytes over
its bandwidth, after the latency of the longest route over it. The latency of a route is that of its links together.
Ranks at the ends compute meanwhile as in `planner.attention_cost`.

Four topologies: `switch_topology`, `full_mesh_topology`, `physical_ring_topology` and `nodes_topology`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.attention_cost import ATTENTION_METHODS, MethodTime, method_times
from planner.attention_rates import KernelRate
from planner.attention_work import AttentionWork, FloatArray, IntArray
from planner.errors import PlanError
from planner.strict_json import as_int, as_number


@dataclass(frozen=True)
class Topology:
    """Links between ranks, and the links of each message; a `planner.attention_rates.Network`.

    Attributes:
        name: For people.
        num_ranks: N.
        bandwidths_bytes_per_s: ``[links]``.
        pairs: ``int64 [uses]``: the pair of ranks, ``source * N + target``, of each use of a link.
        links: ``int64 [uses]``: the link.
        shares: ``[uses]``: share of the pair's bytes that take it.
        latencies_s: ``[uses]``: latency of the route that uses it.
    """

    name: str
    num_ranks: int
    bandwidths_bytes_per_s: FloatArray
    pairs: IntArray
    links: IntArray
    shares: FloatArray
    latencies_s: FloatArray

    def transfer_s(self, messages: FloatArray) -> float:
        """Return the seconds until the last of some messages that start together has arrived; 0 without messages.

        Args:
            messages: ``[N, N]``, bytes from the rank of the row to the rank of the column.
        """
        num_bytes = messages.ravel()[self.pairs] * self.shares
        used = num_bytes > 0
        if not used.any():
            return 0.0
        num_links = len(self.bandwidths_bytes_per_s)
        load_bytes = np.bincount(self.links, weights=num_bytes, minlength=num_links)
        latency_s = np.zeros(num_links)
        np.maximum.at(latency_s, self.links[used], self.latencies_s[used])
        return float((latency_s + load_bytes / self.bandwidths_bytes_per_s).max())


def switch_topology(num_ranks: int, *, bandwidth_bytes_per_s: float, latency_s: float, duplex: bool = True) -> Topology:
    """Return ranks around a switch that never blocks.

    Args:
        num_ranks: N.
        bandwidth_bytes_per_s: Of a rank's port in one direction.
        latency_s: From rank to rank.
        duplex: A port sends and receives at full bandwidth at the same time; otherwise both share it.
    """

    def routes(source: int, target: int) -> list[list[_Wire]]:
        sending, receiving = ("out", "in") if duplex else ("port", "port")
        return [
            [
                _Wire((sending, source), bandwidth_bytes_per_s, latency_s),
                _Wire((receiving, target), bandwidth_bytes_per_s, 0.0),
            ]
        ]

    return _topology("switch", num_ranks, routes, bandwidth_bytes_per_s, latency_s)


def full_mesh_topology(
    num_ranks: int, *, bandwidth_bytes_per_s: float, latency_s: float, duplex: bool = True
) -> Topology:
    """Return a link for each pair of ranks.

    Args:
        num_ranks: N.
        bandwidth_bytes_per_s: Of all links of a rank together, in one direction; each has 1/(N-1) of it.
        latency_s: Of a link.
        duplex: Both directions of a link at the same time; otherwise they share it.
    """
    link_bytes_per_s = bandwidth_bytes_per_s / max(1, num_ranks - 1)

    def routes(source: int, target: int) -> list[list[_Wire]]:
        ends = (source, target) if duplex else (min(source, target), max(source, target))
        return [[_Wire(ends, link_bytes_per_s, latency_s)]]

    return _topology("full mesh", num_ranks, routes, bandwidth_bytes_per_s, latency_s)


def physical_ring_topology(
    num_ranks: int, *, bandwidth_bytes_per_s: float, latency_s: float, duplex: bool = True
) -> Topology:
    """Return ranks that are connected to their two neighbours only.

    A message takes the shorter way and loads every link of it; at half of the ring, half of it goes each way.

    Args:
        num_ranks: N.
        bandwidth_bytes_per_s: Of one link in one direction.
        latency_s: Of a link.
        duplex: Both directions of a link at the same time; otherwise they share it.
    """

    def way(source: int, hops: int, direction: int) -> list[_Wire]:
        # Cable i is between ranks i and i + 1, so that two ranks have one on each side.
        cables = [(source + (hop if direction > 0 else -1 - hop)) % num_ranks for hop in range(hops)]
        ends = [(cable, direction) if duplex else (cable,) for cable in cables]
        return [_Wire(end, bandwidth_bytes_per_s, latency_s) for end in ends]

    def routes(source: int, target: int) -> list[list[_Wire]]:
        ahead = (target - source) % num_ranks
        behind = num_ranks - ahead
        ways = [(ahead, 1)] * (ahead <= behind) + [(behind, -1)] * (behind <= ahead)
        return [way(source, hops, direction) for hops, direction in ways]

    return _topology("physical ring", num_ranks, routes, bandwidth_bytes_per_s, latency_s)


def nodes_topology(
    num_ranks: int,
    *,
    inside_bandwidth_bytes_per_s: float,
    inside_latency_s: float,
    nic_bandwidth_bytes_per_s: float,
    nic_latency_s: float,
    ranks_per_node: int = 8,
    nics_per_node: int | None = None,
) -> Topology:
    """Return nodes with a switch inside and slower network cards between.

    Args:
        num_ranks: N; ranks are numbered node by node.
        inside_bandwidth_bytes_per_s: Of a rank's port inside its node, in one direction.
        inside_latency_s: From rank to rank inside a node.
        nic_bandwidth_bytes_per_s: Of one card, in one direction.
        nic_latency_s: From node to node.
        ranks_per_node: Neighbouring ranks of one node.
        nics_per_node: Cards that the ranks of a node share equally; `None`: one for each rank.
    """
    as_int(ranks_per_node, "ranks_per_node", PlanError, minimum=1)
    num_nics = ranks_per_node if nics_per_node is None else as_int(nics_per_node, "nics_per_node", PlanError, minimum=1)

    def nic(rank: int) -> tuple[int, int]:
        node, place = divmod(rank, ranks_per_node)
        return node, place * num_nics // ranks_per_node

    def routes(source: int, target: int) -> list[list[_Wire]]:
        if source // ranks_per_node == target // ranks_per_node:
            bandwidth, latency_s = inside_bandwidth_bytes_per_s, inside_latency_s
            ends: tuple[tuple[object, ...], ...] = (("out", source), ("in", target))
        else:
            bandwidth, latency_s = nic_bandwidth_bytes_per_s, nic_latency_s
            ends = (("nic out", *nic(source)), ("nic in", *nic(target)))
        return [[_Wire(ends[0], bandwidth, latency_s), _Wire(ends[1], bandwidth, 0.0)]]

    as_number(inside_bandwidth_bytes_per_s, "inside_bandwidth_bytes_per_s", PlanError, positive=True)
    as_number(inside_latency_s, "inside_latency_s", PlanError)
    return _topology(f"nodes of {ranks_per_node}", num_ranks, routes, nic_bandwidth_bytes_per_s, nic_latency_s)


def simulate_attention(
    work: AttentionWork,
    topology: Topology,
    rate: KernelRate,
    methods: Iterable[str] = ATTENTION_METHODS,
    *,
    hides_last_return: bool = False,
) -> tuple[MethodTime, ...]:
    """Predict forward and backward of each method on a topology; see `planner.attention_cost.method_times`.

    Raises:
        PlanError: A method is unknown, or the topology has other ranks than the group.
    """
    if topology.num_ranks != work.degree:
        raise PlanError(
            f"the topology has {topology.num_ranks} ranks, the group {work.degree}; expected as many. Build the topology "
            "for the degree of the work."
        )
    return method_times(work, topology, rate, methods, hides_last_return=hides_last_return)


class _Wire(NamedTuple):
    """One link: what names it, its bandwidth, and what it adds to the latency of a message."""

    ends: tuple[object, ...]
    bandwidth_bytes_per_s: float
    latency_s: float


def _topology(
    name: str,
    num_ranks: int,
    routes: Callable[[int, int], list[list[_Wire]]],
    bandwidth_bytes_per_s: float,
    latency_s: float,
) -> Topology:
    """Number the links of all routes; a pair's bytes are split equally over its routes."""
    as_int(num_ranks, "num_ranks", PlanError, minimum=1)
    as_number(bandwidth_bytes_per_s, "bandwidth_bytes_per_s", PlanError, positive=True)
    as_number(latency_s, "latency_s", PlanError)
    numbers: dict[tuple[object, ...], int] = {}
    bandwidths: list[float] = []
    uses: list[tuple[int, int, float, float]] = []
    for source, target in itertools.permutations(range(num_ranks), 2):
        ways = routes(source, target)
        for way in ways:
            route_latency_s = sum(wire.latency_s for wire in way)
            for wire in way:
                if wire.ends not in numbers:
                    numbers[wire.ends] = len(bandwidths)
                    bandwidths.append(wire.bandwidth_bytes_per_s)
                uses.append((source * num_ranks + target, numbers[wire.ends], 1 / len(ways), route_latency_s))
    table = np.array(uses, dtype=np.float64).reshape(len(uses), 4)
    return Topology(
        name=name,
        num_ranks=num_ranks,
        bandwidths_bytes_per_s=np.array(bandwidths, dtype=np.float64),
        pairs=table[:, 0].astype(np.int64),
        links=table[:, 1].astype(np.int64),
        shares=table[:, 2],
        latencies_s=table[:, 3],
    )
