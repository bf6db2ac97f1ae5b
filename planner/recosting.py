"""Costing the groups of a plan again: without one of its sequences, under other constants, on other nodes.

A grouping keeps who runs what where and forgets the predicted numbers. Here is no search.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.group_kind import GroupKind
from planner.plan import StepPlan

PER_LAYER, PER_STEP = "per-layer", "per-step"


@dataclass(frozen=True)
class PlacedGroup:
    """A group of one micro-batch: its ranks, its kind at those ranks, and its sequence ids."""

    ranks: tuple[int, ...]
    kind: GroupKind
    sequences: tuple[int, ...]


Grouping = tuple[tuple[PlacedGroup, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """When the groups of a grouping run.

    Attributes:
        times_s: Of every group, by micro-batch.
        starts_s: The same of their starts, counted from the first one.
        end_s: End of the last group.
        step_time_s: `end_s` and what a step costs outside of its micro-batches.
        busy_by_rank_s: Seconds in which each rank has work.
        end_by_rank_s: End of each rank's last group; 0 for a rank without any.
        critical: The groups that the end depends on, as micro-batch -> place of the group: under per-layer the slowest
            of each micro-batch, under per-step a chain of groups without a pause, which may leave out micro-batches.
    """

    times_s: tuple[tuple[float, ...], ...]
    starts_s: tuple[tuple[float, ...], ...]
    end_s: float
    step_time_s: float
    busy_by_rank_s: tuple[float, ...]
    end_by_rank_s: tuple[float, ...]
    critical: Mapping[int, int]


def plan_cluster(plan: StepPlan, cost_model: CostModel) -> Cluster:
    """Return the nodes of a plan; where it names none, equal nodes as the cost model was measured on."""
    return plan.cluster or Cluster.uniform(plan.num_ranks, cost_model.gpus_per_node)


def grouping_of(plan: StepPlan, cluster: Cluster) -> Grouping:
    """Return the groups of a plan with their kinds on `cluster`, which must have every rank of the plan."""
    return tuple(
        tuple(
            PlacedGroup(
                group.ranks,
                cluster.kind_at(GroupKind(group.degree, group.attention, group.recompute), group.ranks),
                group.sequences,
            )
            for group in micro_batch.groups
        )
        for micro_batch in plan.micro_batches
    )


def without(grouping: Grouping, sequences: Collection[int]) -> Grouping:
    """Return the same groups without some sequences; groups and micro-batches that are left empty go."""
    kept = tuple(
        tuple(
            PlacedGroup(group.ranks, group.kind, left)
            for group in micro_batch
            if (left := tuple(i for i in group.sequences if i not in sequences))
        )
        for micro_batch in grouping
    )
    return tuple(micro_batch for micro_batch in kept if micro_batch)


def fits(grouping: Grouping, lengths: Sequence[int], cost_model: CostModel, num_ranks: int, sync: str) -> bool:
    """Say whether every group is within its memory."""
    return all(
        cost_model.kind_memory_bytes(sum(lengths[i] for i in group.sequences), group.kind, num_ranks, sync)
        <= cost_model.kind_limit_bytes(group.kind)
        for micro_batch in grouping
        for group in micro_batch
    )


def schedule(
    grouping: Grouping,
    lengths: Sequence[int],
    cost_model: CostModel,
    num_ranks: int,
    sync: str,
    *,
    gang: bool | None = None,
) -> Schedule:
    """Cost every group and lay the groups out in time.

    Under per-layer a micro-batch starts when the one before has ended everywhere; under per-step a group starts when
    the earlier groups of all its ranks have ended.

    Args:
        grouping: Groups with their ranks, in the order of their micro-batches.
        lengths: Tokens of every sequence of the batch.
        cost_model: Predicts the times.
        num_ranks: Ranks of the job.
        sync: Which costs a group and a step have.
        gang: Lay out as under per-step, whatever the costs; `None`: as `sync` says.
    """
    gang = sync == PER_STEP if gang is None else gang
    ends, busy = [0.0] * num_ranks, [0.0] * num_ranks
    times: list[tuple[float, ...]] = []
    starts: list[tuple[float, ...]] = []
    end_s = 0.0
    for micro_batch in grouping:
        spent = [cost_model.kind_time_s([lengths[i] for i in g.sequences], g.kind, sync) for g in micro_batch]
        begun = [max(ends[rank] for rank in group.ranks) if gang else end_s for group in micro_batch]
        for group, start_s, time_s in zip(micro_batch, begun, spent, strict=True):
            for rank in group.ranks:
                ends[rank] = start_s + time_s
                busy[rank] += time_s
        end_s = max(ends)
        times.append(tuple(spent))
        starts.append(tuple(begun))
    return Schedule(
        times_s=tuple(times),
        starts_s=tuple(starts),
        end_s=end_s,
        step_time_s=end_s + cost_model.step_fixed_s(sync),
        busy_by_rank_s=tuple(busy),
        end_by_rank_s=tuple(ends),
        critical=_chain(grouping, starts, times) if gang else _slowest(times),
    )


def recosted_step_time_s(
    plan: StepPlan, lengths: Sequence[int], cost_model: CostModel, cluster: Cluster, sync: str
) -> float | None:
    """Predict the step of a plan's groups on another cluster or under another model; `None` where they do not fit.

    Args:
        plan: Who runs what where; its predicted numbers do not count.
        lengths: Tokens of every sequence of the batch.
        cost_model: Predicts time and memory.
        cluster: Nodes, with at least the plan's ranks; the model states are sharded over all of its ranks.
        sync: ``"per-layer"`` or ``"per-step"``.
    """
    grouping = grouping_of(plan, cluster)
    if not fits(grouping, lengths, cost_model, cluster.num_ranks, sync):
        return None
    return schedule(grouping, lengths, cost_model, cluster.num_ranks, sync).step_time_s


def _slowest(times: Sequence[Sequence[float]]) -> dict[int, int]:
    return {m: max(range(len(spent)), key=spent.__getitem__) for m, spent in enumerate(times)}


def _chain(grouping: Grouping, starts: Sequence[Sequence[float]], times: Sequence[Sequence[float]]) -> dict[int, int]:
    """Follow the last group back: each starts exactly when one before it, which shares a rank, ends."""
    every = [(m, g) for m, micro_batch in enumerate(grouping) for g in range(len(micro_batch))]
    chain: dict[int, int] = {}
    if not every:
        return chain
    m, g = max(every, key=lambda at: starts[at[0]][at[1]] + times[at[0]][at[1]])
    while True:
        chain[m] = g
        ranks = set(grouping[m][g].ranks)
        before = [at for at in every if at[0] < m and not ranks.isdisjoint(grouping[at[0]][at[1]].ranks)]
        previous = [at for at in before if starts[at[0]][at[1]] + times[at[0]][at[1]] == starts[m][g]]
        if not previous:
            return chain
        m, g = previous[-1]
