"""Cost models and clusters with one thing changed: more memory, faster links, smaller fixed cost, other nodes."""

from __future__ import annotations

import dataclasses
import math

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.method_cost import MethodCost, Table, listed_s

# Where neither the plan nor the cost model says how many GPUs a node has.
_USUAL_GPUS_PER_NODE = 8


def with_memory(cost_model: CostModel, factor: float) -> CostModel:
    """Return the model with `factor` times the memory of each rank."""
    return dataclasses.replace(cost_model, memory_limit_bytes=cost_model.memory_limit_bytes * factor)


def with_node_memory(cluster: Cluster, factor: float) -> Cluster:
    """Return the cluster with `factor` times the memory of each node that has a limit of its own."""
    return Cluster(
        tuple(
            node
            if node.memory_limit_bytes is None
            else dataclasses.replace(node, memory_limit_bytes=node.memory_limit_bytes * factor)
            for node in cluster.nodes
        )
    )


def with_faster_links(cost_model: CostModel, *, inside: float = 1.0, between: float = 1.0) -> CostModel:
    """Return the model with faster links; fixed seconds (latency) stay.

    Args:
        cost_model: The model.
        inside: How many times faster the links inside nodes become.
        between: The same between nodes. They never get faster than those inside a node.
    """
    gpus_per_node = cost_model.gpus_per_node
    primary = cost_model.method_cost(cost_model.attention)
    near, far = _faster_tables(primary, gpus_per_node, inside, between)
    methods = []
    for method in cost_model.methods:
        tables = _faster_tables(method, gpus_per_node, inside, between)
        methods.append(dataclasses.replace(method, communication_s=tables[0], between_nodes_s=tables[1]))
    return dataclasses.replace(cost_model, communication_s=near, between_nodes_s=far, methods=tuple(methods))


def with_more_heads(cost_model: CostModel, factor: int) -> CostModel:
    """Return the model with `factor` times the heads that Ulysses can share; times stay."""
    heads = None if cost_model.num_heads is None else cost_model.num_heads * factor
    kv_heads = None if cost_model.num_kv_heads is None else cost_model.num_kv_heads * factor
    return dataclasses.replace(cost_model, num_heads=heads, num_kv_heads=kv_heads)


def neighbouring_clusters(
    cluster: Cluster | None, num_ranks: int, gpus_per_node: int | None
) -> tuple[Cluster, Cluster | None]:
    """Return the cluster with one node more and with one node less; `None` where nothing would be left.

    Args:
        cluster: The nodes: a node like the last one comes, and the last one goes. `None`: all are equal.
        num_ranks: Ranks of the job.
        gpus_per_node: Of equal nodes; `None`: unknown, then one node that grows and shrinks by at most 8 GPUs.
    """
    if cluster is not None:
        fewer = Cluster(cluster.nodes[:-1]) if len(cluster.nodes) > 1 else None
        return Cluster((*cluster.nodes, cluster.nodes[-1])), fewer
    size = gpus_per_node or min(_USUAL_GPUS_PER_NODE, num_ranks)
    fewer = Cluster.uniform(num_ranks - size, gpus_per_node) if num_ranks > size else None
    return Cluster.uniform(num_ranks + size, gpus_per_node), fewer


def _faster_tables(method: MethodCost, gpus_per_node: int | None, inside: float, between: float) -> tuple[Table, Table]:
    """Write out what groups that span nodes are charged at present, so that each kind of link changes alone."""
    measured = dict(method.communication_s)
    largest = math.inf
    if measured and gpus_per_node is not None and not method.between_nodes_s:
        # One table for both: degrees above a node's GPUs were measured between nodes.
        largest = gpus_per_node
        if gpus_per_node > 1:
            measured[gpus_per_node] = listed_s(method.communication_s, gpus_per_node)
    near = tuple((d, seconds / (inside if d <= largest else between)) for d, seconds in sorted(measured.items()))
    degrees = sorted({*measured, *(degree for degree, _ in method.between_nodes_s)})
    far = tuple((d, max(method.constant_s(d, True, gpus_per_node) / between, listed_s(near, d))) for d in degrees)
    return near, far
