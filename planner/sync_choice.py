"""Planning a batch under both synchronisations and keeping the faster plan, with the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.cost_model import CostModel
from planner.errors import InfeasibleError
from planner.plan import StepPlan
from planner.planning import plan_step
from planner.recosting import PER_LAYER, PER_STEP, grouping_of, plan_cluster
from planner.sync_comparison import compare_syncs


def better_sync(
    lengths: Sequence[int], num_ranks: int, cost_model: CostModel, **arguments: Any
) -> tuple[StepPlan, StepPlan | None, str]:
    """Plan under per-layer and under per-step.

    Args:
        lengths: Tokens of every sequence.
        num_ranks: Ranks of the job.
        cost_model: Predicts time and memory.
        **arguments: The others of `plan_step`, without `sync`.

    Returns:
        The faster plan, per-layer where they are equal; the other one, `None` where that sync has no plan; and why the
        first wins: parameter traffic and waiting saved, against memory lost to unsharded parameters.

    Raises:
        InfeasibleError: Neither synchronisation has a plan; as `plan_step` says it for per-layer.
        PlanError: An argument is malformed.
    """
    per_layer = plan_step(lengths, num_ranks, cost_model, sync=PER_LAYER, **arguments)
    if cost_model.unsharded_state_bytes is None:
        return per_layer, None, f"per-layer: cost model {cost_model.name!r} does not know unsharded_state_bytes"
    try:
        per_step = plan_step(lengths, num_ranks, cost_model, sync=PER_STEP, **arguments)
    except InfeasibleError as cause:
        # The states alone are sharded over more ranks under per-layer, so it has a plan wherever per-step has one.
        return per_layer, None, f"per-layer is the only one with a plan: under per-step, {cause}"
    faster = per_step if per_step.predicted_step_time_s < per_layer.predicted_step_time_s else per_layer
    slower = per_layer if faster is per_step else per_step
    comparison = compare_syncs(
        grouping_of(faster, plan_cluster(faster, cost_model)),
        lengths,
        cost_model,
        num_ranks,
        per_layer_s=per_layer.predicted_step_time_s,
        per_step_s=per_step.predicted_step_time_s,
    )
    return faster, slower, comparison.reason
