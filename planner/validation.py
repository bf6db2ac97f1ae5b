"""Checking a plan from the outside: everything is recomputed from the lengths and the cost model's constants.

Nothing here calls the search or the cost functions that planned: the formulas are written down a second time, so that
an error in one of them shows. Sums are taken in another order and compared to a relative 1e-9.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from planner.cost_model import CostModel
from planner.plan import LOCAL_ATTENTION, GroupPlan, StepPlan

_TOLERANCE = 1e-9


def validate_plan(plan: StepPlan, lengths: Sequence[int], cost_model: CostModel) -> list[str]:
    """Recost a plan and check that it is complete, disjoint, within memory and honest.

    Args:
        plan: The plan.
        lengths: Tokens of every sequence of the batch; the index is the sequence id.
        cost_model: The model the plan was made with.

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
    if plan.sync != "per-layer":
        faults.append(f"sync is {plan.sync!r}; only 'per-layer' is known")
    faults += _sequence_faults(plan, len(lengths))
    measured = []
    for m, micro_batch in enumerate(plan.micro_batches):
        if not micro_batch.groups:
            faults.append(f"micro-batch {m} has no groups")
            continue
        faults += _rank_faults(m, micro_batch.groups, plan.num_ranks)
        times = []
        for g, group in enumerate(micro_batch.groups):
            where = f"micro-batch {m} group {g}"
            known = [lengths[i] for i in group.sequences if 0 <= i < len(lengths)]
            faults += [f"{where} {fault}" for fault in _group_faults(group, known, plan.num_ranks, cost_model)]
            times.append(_time_s(known, max(1, group.degree), cost_model))
        slowest_s = max(times)
        measured.append(slowest_s)
        if not _same(micro_batch.predicted_time_s, slowest_s):
            faults.append(
                f"micro-batch {m} has predicted_time_s {micro_batch.predicted_time_s}, but its slowest group takes "
                f"{slowest_s}"
            )
    faults += _step_faults(plan, sum(reversed(measured)) + cost_model.fixed_step_s)
    return faults


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


def _group_faults(group: GroupPlan, lengths: Sequence[int], num_ranks: int, cost_model: CostModel) -> list[str]:
    faults = []
    if group.degree != len(group.ranks):
        faults.append(f"has degree {group.degree}, but {len(group.ranks)} ranks")
    if not group.sequences:
        faults.append("has no sequences; leave its ranks out of the plan")
    if (group.attention == LOCAL_ATTENTION) != (group.degree == 1):
        faults.append(f"of degree {group.degree} has attention {group.attention!r}")
    heads = cost_model.num_heads
    if group.attention == "ulysses" and heads is not None and group.degree >= 1 and heads % group.degree:
        faults.append(f"of degree {group.degree} runs ulysses, which cannot share {heads} heads")
    num_tokens = sum(lengths)
    if group.num_tokens != num_tokens:
        faults.append(f"has num_tokens {group.num_tokens}, but its sequences have {num_tokens}")
    degree = max(1, group.degree)
    states = cost_model.model_state_bytes_total / max(1, num_ranks) + cost_model.model_state_bytes_fixed
    memory_bytes = states + cost_model.bytes_per_token * (num_tokens / degree)
    # The plan holds whole bytes.
    if abs(group.predicted_memory_bytes - memory_bytes) > 1 + _TOLERANCE * memory_bytes:
        faults.append(f"has predicted_memory_bytes {group.predicted_memory_bytes}, but needs {memory_bytes:.0f}")
    if memory_bytes > cost_model.memory_limit_bytes * (1 + 1e-12):
        faults.append(
            f"needs {memory_bytes:.0f} bytes on each rank, above the limit of {cost_model.memory_limit_bytes:.0f}"
        )
    time_s = _time_s(lengths, degree, cost_model)
    if not _same(group.predicted_time_s, time_s):
        faults.append(f"has predicted_time_s {group.predicted_time_s}, but takes {time_s}")
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


def _time_s(lengths: Sequence[int], degree: int, model: CostModel) -> float:
    compute_s = math.fsum(model.a1_s_per_token2 * s**2 + model.a2_s_per_token * s for s in lengths) / degree
    if degree == 1:
        return compute_s + model.b1_s
    listed = dict(model.communication_s)
    above = [d for d in listed if d >= degree]
    per_share_s = listed[min(above) if above else max(listed)] if listed else 0.0
    return compute_s + model.b1_s + model.b2_s + per_share_s * (sum(lengths) / degree)


def _same(stated: float, recomputed: float) -> bool:
    return math.isclose(stated, recomputed, rel_tol=_TOLERANCE, abs_tol=1e-15)


def _listed(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return f"sequence{'s' if len(ids) > 1 else ''} {shown} {'are' if len(ids) > 1 else 'is'}"
