"""Checking a plan from the outside: everything is recomputed from the lengths and the cost model's constants.

Nothing here calls the search or the cost functions that planned: the formulas are written down a second time, so that
an error in one of them shows. Sums are taken in another order and compared to a relative 1e-9.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.plan import LOCAL_ATTENTION, GroupPlan, StepPlan

_TOLERANCE = 1e-9


class _Place(NamedTuple):
    """What the ranks of a group are: on different nodes, speed of the slowest, bytes of the smallest."""

    spans_nodes: bool
    speed: float
    limit_bytes: float


def validate_plan(
    plan: StepPlan, lengths: Sequence[int], cost_model: CostModel, cluster: Cluster | None = None
) -> list[str]:
    """Recost a plan and check that it is complete, disjoint, within memory and honest.

    Args:
        plan: The plan.
        lengths: Tokens of every sequence of the batch; the index is the sequence id.
        cost_model: The model the plan was made with.
        cluster: Its nodes; `None`: the plan's, and where it names none, equal nodes as the cost model was measured on.

    Returns:
        One line for every fault, naming micro-batch, group and values; empty for a valid plan.
    """
    faults: list[str] = []
    if plan.plan_id != plan.expected_plan_id():
        faults.append(f"plan_id is {plan.plan_id}, but the content has {plan.expected_plan_id()}")
    if plan.cost_model.sha256 != cost_model.sha256:
        faults.append(
            f"the plan was made with cost model {plan.cost_model.name!r} ({plan.cost_model.sha256[:12]}), "
            f"not with {cost_model.name!r} ({cost_model.sha256[:12]})"
        )
    if plan.sync not in ("per-layer", "per-step"):
        faults.append(f"sync is {plan.sync!r}; expected 'per-layer' or 'per-step'")
    if plan.sync == "per-step" and cost_model.unsharded_state_bytes is None:
        faults.append("sync is 'per-step', but the cost model does not know unsharded_state_bytes")
    cluster = cluster or plan.cluster or Cluster.uniform(max(1, plan.num_ranks), cost_model.gpus_per_node)
    node_of_rank = [index for index, node in enumerate(cluster.nodes) for _ in range(node.num_gpus)]
    if len(node_of_rank) != plan.num_ranks:
        faults.append(f"the plan has {plan.num_ranks} ranks, but the cluster has {len(node_of_rank)}")
    faults += _sequence_faults(plan, len(lengths))
    slowest: list[float] = []
    ends: dict[int, float] = {}
    for m, micro_batch in enumerate(plan.micro_batches):
        if not micro_batch.groups:
            faults.append(f"micro-batch {m} has no groups")
            continue
        faults += _rank_faults(m, micro_batch.groups, plan.num_ranks)
        times = []
        for g, group in enumerate(micro_batch.groups):
            where = f"micro-batch {m} group {g}"
            known = [lengths[i] for i in group.sequences if 0 <= i < len(lengths)]
            place = _place(group.ranks, cluster, node_of_rank, cost_model)
            time_s = _time_s(group, known, place, plan.sync, cost_model)
            found = [*_group_faults(group, known, cost_model), *_memory_faults(group, known, place, plan, cost_model)]
            if not _same(group.predicted_time_s, time_s):
                found.append(f"has predicted_time_s {group.predicted_time_s}, but takes {time_s}")
            faults += [f"{where} {fault}" for fault in found]
            times.append(time_s)
        slowest.append(max(times))
        if not _same(micro_batch.predicted_time_s, slowest[-1]):
            faults.append(
                f"micro-batch {m} has predicted_time_s {micro_batch.predicted_time_s}, but its slowest group takes "
                f"{slowest[-1]}"
            )
        started = [max((ends.get(rank, 0.0) for rank in group.ranks), default=0.0) for group in micro_batch.groups]
        for group, start_s, time_s in zip(micro_batch.groups, started, times, strict=True):
            ends.update(dict.fromkeys(group.ranks, start_s + time_s))
    zero_s = cost_model.zero_traffic_s - cost_model.zero_traffic_s * cost_model.zero_overlap
    if plan.sync == "per-step":
        step_time_s = max(ends.values(), default=0.0) + cost_model.fixed_step_s + zero_s
    else:
        step_time_s = sum(reversed(slowest)) + cost_model.fixed_step_s
    return faults + _step_faults(plan, step_time_s)


def _sequence_faults(plan: StepPlan, num_sequences: int) -> list[str]:
    faults = []
    if plan.num_sequences != num_sequences:
        faults.append(f"num_sequences is {plan.num_sequences}, but the batch has {num_sequences}")
    seen = Counter(i for micro_batch in plan.micro_batches for group in micro_batch.groups for i in group.sequences)
    missing = [i for i in range(num_sequences) if i not in seen]
    if missing:
        faults.append(f"{_listed(missing)} in no group")
    twice = sorted(i for i, count in seen.items() if count > 1)
    if twice:
        faults.append(f"{_listed(twice)} more than once")
    unknown = sorted(i for i in seen if not 0 <= i < num_sequences)
    if unknown:
        faults.append(f"{_listed(unknown)} not in the batch of {num_sequences}")
    return faults


def _rank_faults(m: int, groups: Sequence[GroupPlan], num_ranks: int) -> list[str]:
    owners = Counter(rank for group in groups for rank in group.ranks)
    faults = [f"micro-batch {m} uses rank {rank} {count} times" for rank, count in sorted(owners.items()) if count > 1]
    outside = sorted(rank for rank in owners if not 0 <= rank < num_ranks)
    if outside:
        faults.append(f"micro-batch {m} uses rank {outside[0]}, but the plan has {num_ranks} ranks")
    return faults


def _group_faults(group: GroupPlan, lengths: Sequence[int], cost_model: CostModel) -> list[str]:
    faults = []
    if group.degree != len(group.ranks):
        faults.append(f"has degree {group.degree}, but {len(group.ranks)} ranks")
    if not group.sequences:
        faults.append("has no sequences; leave its ranks out of the plan")
    if (group.attention == LOCAL_ATTENTION) != (group.degree == 1):
        faults.append(f"of degree {group.degree} has attention {group.attention!r}")
    elif group.degree > 1 and not cost_model.knows_method(group.attention):
        faults.append(f"has attention {group.attention!r}, which is no method of the cost model")
    if group.attention == "ulysses" and group.degree >= 1:
        heads, kv_heads = cost_model.num_heads, cost_model.num_kv_heads
        if heads is not None and heads % group.degree:
            faults.append(f"of degree {group.degree} runs ulysses, which cannot share {heads} heads")
        if kv_heads is not None and kv_heads % group.degree and group.degree % kv_heads:
            faults.append(f"of degree {group.degree} runs ulysses, which cannot share {kv_heads} key/value heads")
    if group.recompute != "default" and all(p.name != group.recompute for p in cost_model.recompute_policies):
        faults.append(f"has recompute {group.recompute!r}, which the cost model does not know")
    num_tokens = sum(lengths)
    if group.num_tokens != num_tokens:
        faults.append(f"has num_tokens {group.num_tokens}, but its sequences have {num_tokens}")
    return faults


def _memory_faults(
    group: GroupPlan, lengths: Sequence[int], place: _Place, plan: StepPlan, cost_model: CostModel
) -> list[str]:
    faults = []
    bytes_per_token = cost_model.bytes_per_token
    for policy in cost_model.recompute_policies:
        if policy.name == group.recompute:
            bytes_per_token = policy.bytes_per_token
    states = cost_model.model_state_bytes_total / max(1, plan.num_ranks) + cost_model.model_state_bytes_fixed
    if plan.sync == "per-step":
        states += cost_model.unsharded_state_bytes or 0.0
    memory_bytes = states + bytes_per_token * (sum(lengths) / max(1, group.degree))
    # The plan holds whole bytes.
    if abs(group.predicted_memory_bytes - memory_bytes) > 1 + _TOLERANCE * memory_bytes:
        faults.append(f"has predicted_memory_bytes {group.predicted_memory_bytes}, but needs {memory_bytes:.0f}")
    if memory_bytes > place.limit_bytes * (1 + 1e-12):
        faults.append(f"needs {memory_bytes:.0f} bytes on each rank, above the limit of {place.limit_bytes:.0f}")
    return faults


def _step_faults(plan: StepPlan, step_time_s: float) -> list[str]:
    faults = []
    if not _same(plan.predicted_step_time_s, step_time_s):
        faults.append(
            f"predicted_step_time_s is {plan.predicted_step_time_s}, but the micro-batches and the fixed part of the "
            f"step take {step_time_s}"
        )
    if plan.lower_bound_s > step_time_s * (1 + _TOLERANCE):
        faults.append(f"lower_bound_s {plan.lower_bound_s} is above the step time {step_time_s}")
    if plan.outcome == "optimal" and step_time_s > plan.lower_bound_s * (1 + 2 * _TOLERANCE):
        faults.append(f"outcome is 'optimal', but the step takes {step_time_s} and the bound is {plan.lower_bound_s}")
    return faults


def _place(ranks: Sequence[int], cluster: Cluster, node_of_rank: Sequence[int], model: CostModel) -> _Place:
    # Ranks outside of the cluster are a fault of their own.
    indices = sorted({node_of_rank[rank] for rank in ranks if 0 <= rank < len(node_of_rank)})
    nodes = [cluster.nodes[index] for index in indices]
    limits = [node.memory_limit_bytes or model.memory_limit_bytes for node in nodes]
    return _Place(
        spans_nodes=len(nodes) > 1,
        speed=min((node.speed for node in nodes), default=1.0),
        limit_bytes=min(limits, default=model.memory_limit_bytes),
    )


def _time_s(group: GroupPlan, lengths: Sequence[int], place: _Place, sync: str, model: CostModel) -> float:
    degree = max(1, group.degree)
    compute, traffic = 1.0, 1.0
    for policy in model.recompute_policies:
        if policy.name == group.recompute:
            compute, traffic = policy.compute_factor, policy.communication_factor
    communication_s, between_s = model.communication_s, model.between_nodes_s
    overlap, method_fixed_s = model.overlap, model.method_fixed_s
    for method in model.methods:
        if method.name == group.attention:
            communication_s, between_s = method.communication_s, method.between_nodes_s
            overlap, method_fixed_s = method.overlap, method.fixed_s
    constant_s = 0.0
    if degree > 1:
        constant_s = _constant_s(dict(communication_s), dict(between_s), degree, place, model.gpus_per_node)
    softmax = model.softmax_layer_share
    seconds = []
    for s in lengths:
        work = s**2 / degree + s * model.half_length_tokens
        quadratic_s = work * model.a1_s_per_token2 * model.causal_factor * softmax * compute / place.speed
        hidden_s = quadratic_s * overlap
        seconds.append(quadratic_s)
        seconds.append(model.a2_s_per_token * s * compute / (degree * place.speed))
        seconds.append(model.per_sequence_s)
        seconds.append(max(0.0, constant_s * s * traffic * softmax / degree - hidden_s))
    seconds.append(model.b1_s)
    if degree > 1:
        states = dict(model.state_exchange_by_degree_s), dict(model.state_exchange_between_nodes_s)
        seconds += [model.b2_s, method_fixed_s, model.state_exchange_s]
        seconds.append(_constant_s(*states, degree, place, model.gpus_per_node))
    if sync != "per-step":
        seconds.append(model.zero_traffic_s - model.zero_traffic_s * model.zero_overlap)
    return math.fsum(seconds)


def _constant_s(
    inside: dict[int, float], between: dict[int, float], degree: int, place: _Place, gpus_per_node: int | None
) -> float:
    wanted, table = degree, inside
    if place.spans_nodes and between:
        table = between
    elif place.spans_nodes and gpus_per_node is not None and degree <= gpus_per_node:
        wider = [listed for listed in inside if listed > gpus_per_node]
        wanted = min(wider) if wider else degree
    above = [listed for listed in table if listed >= wanted]
    return table[min(above) if above else max(table)] if table else 0.0


def _same(stated: float, recomputed: float) -> bool:
    return math.isclose(stated, recomputed, rel_tol=_TOLERANCE, abs_tol=1e-15)


def _listed(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return f"sequence{'s' if len(ids) > 1 else ''} {shown} {'are' if len(ids) > 1 else 'is'}"
