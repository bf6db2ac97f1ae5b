"""The links between a run's workers, measured before it trains; a slow one is named, and never ends the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from raysp.cluster.worker_group import WorkerGroup
from raysp.comm import PairMeasurement
from raysp.comm.links import ring_pairs
from raysp.tracking.events import LinksMeasured, MeasuredLink, rate_text

# A link below this share of the median of its kind is worth a look.
_SLOW_SHARE = 0.5
# The measurement takes a second; a worker that is still loading a library may be late for it.
_TIMEOUT_S = 600.0


def preflight(workers: WorkerGroup, *, step: int) -> tuple[LinksMeasured, list[str]]:
    """Measure the links between neighbouring ranks, inside each node and between nodes.

    A measurement that finds a slow link is made twice, and each link's better one counts: other work on a machine may
    disturb one, a slow link stays slow.

    Args:
        workers: At least two.
        step: Steps done before.

    Returns:
        What was measured, and a warning for each slow link.

    Raises:
        WorkerFailedError: A worker died or did not answer.
    """
    nodes = [info.node_id for info in workers.infos]
    addresses = [info.node_address for info in workers.infos]
    # Between CPU workers of a node, the link is memory, and as fast as the cores are free.
    inside_nodes = workers.infos[0].device_memory_bytes > 0
    links = links_of(_measured(workers, nodes), nodes, addresses)
    if slow_links(links, inside_nodes=inside_nodes):
        links = better_of(links, links_of(_measured(workers, nodes), nodes, addresses))
    warnings = [slow_link_text(link, median) for link, median in slow_links(links, inside_nodes=inside_nodes)]
    return LinksMeasured(step=step, links=links), warnings


def neighbour_pairs(nodes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of ranks whose links stand for all: each rank and the next, and the same with ranks sorted by node.

    Where the ranks of a node follow each other, the latter adds nothing.

    Args:
        nodes: Node of each rank.
    """
    by_node = sorted(range(len(nodes)), key=lambda rank: (nodes.index(nodes[rank]), rank))
    sorted_pairs = [(by_node[first], by_node[second]) for first, second in ring_pairs(len(nodes))]
    pairs = itertools.chain(ring_pairs(len(nodes)), sorted_pairs)
    return tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))


def links_of(
    pairs: Sequence[PairMeasurement], nodes: Sequence[str], addresses: Sequence[str]
) -> tuple[MeasuredLink, ...]:
    """The measurements with the places of their ranks.

    Args:
        pairs: What was measured.
        nodes: Node of each rank, unique.
        addresses: Network address of each rank's node.
    """
    return tuple(
        MeasuredLink(
            ranks=pair.ranks,
            addresses=(addresses[pair.ranks[0]], addresses[pair.ranks[1]]),
            crosses_nodes=nodes[pair.ranks[0]] != nodes[pair.ranks[1]],
            bandwidth_bytes_per_s=pair.link.bandwidth_bytes_per_s,
            latency_s=pair.link.latency_s,
        )
        for pair in pairs
    )


def better_of(first: Sequence[MeasuredLink], second: Sequence[MeasuredLink]) -> tuple[MeasuredLink, ...]:
    """Of two measurements of the same links, the faster one of each."""
    return tuple(max(pair, key=lambda link: link.bandwidth_bytes_per_s) for pair in zip(first, second, strict=True))


def slow_links(links: Sequence[MeasuredLink], *, inside_nodes: bool) -> list[tuple[MeasuredLink, float]]:
    """The links below half of the median of their kind (inside a node, between nodes), and that median in bytes/s.

    Args:
        links: All that were measured.
        inside_nodes: Whether to look at those inside of a node as well.
    """
    event = LinksMeasured(step=0, links=tuple(links))
    return [
        (link, event.median_bandwidth_bytes_per_s(link.crosses_nodes))
        for link in links
        if (inside_nodes or link.crosses_nodes)
        and link.bandwidth_bytes_per_s < _SLOW_SHARE * event.median_bandwidth_bytes_per_s(link.crosses_nodes)
    ]


def slow_link_text(link: MeasuredLink, median_bytes_per_s: float) -> str:
    """What to tell about a slow link."""
    where = "between nodes" if link.crosses_nodes else "inside nodes"
    remedy = (
        "Look at both nodes' network (cable, NIC, NCCL_SOCKET_IFNAME, NCCL_IB_HCA), or leave one of them out."
        if link.crosses_nodes
        else "Look for other work on that node and, for GPUs, at `nvidia-smi topo -m` and `nvidia-smi nvlink --status`."
    )
    return (
        f"the link between {link.ends_text()} carries {rate_text(link.bandwidth_bytes_per_s)}; the median {where} is "
        f"{rate_text(median_bytes_per_s)}, and every group across it waits for it. {remedy}"
    )


def _measured(workers: WorkerGroup, nodes: Sequence[str]) -> tuple[PairMeasurement, ...]:
    pairs = neighbour_pairs(nodes)
    answers = workers.call_same(
        "measure_links", pairs, tuple(nodes), timeout_s=_TIMEOUT_S, what="measuring the links between workers"
    )
    measured: tuple[PairMeasurement, ...] = answers[0]
    return measured
