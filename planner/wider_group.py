"""What twice the degree would do to the slowest group of a plan, without planning again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.group_kind import GroupKind
from planner.plan import LOCAL_ATTENTION
from planner.recosting import Grouping, PlacedGroup, Schedule, fits, schedule


@dataclass(frozen=True)
class WiderStep:
    """The slowest group at twice its degree; the groups of its micro-batch that ended first made room.

    Attributes:
        micro_batch: Where it runs.
        degree: Twice its degree.
        time_s: Of the group now.
        wider_time_s: At twice the degree.
        num_displaced: Groups whose sequences went to the groups that are left.
        step_time_s: Of the step with it.
    """

    micro_batch: int
    degree: int
    time_s: float
    wider_time_s: float
    num_displaced: int
    step_time_s: float


def wider_kinds(kind: GroupKind, cost_model: CostModel, cluster: Cluster, attention: str) -> list[GroupKind]:
    """Return `kind` at twice its degree, inside a node and then between nodes; empty where that cannot run.

    Args:
        kind: Of the group.
        cost_model: Says which degrees its method allows.
        cluster: Any of its GPUs will do.
        attention: Method in place of ``"local"``.
    """
    method = attention if kind.attention == LOCAL_ATTENTION else kind.attention
    degree = 2 * kind.degree
    if degree > cluster.num_ranks or not cost_model.allows_degree(degree, attention=method):
        return []
    slowest = min(node.speed for node in cluster.nodes)
    wide = GroupKind(degree, method, kind.recompute, False, slowest)
    return [wide, wide._replace(spans_nodes=True)]


def placed_alone(kinds: Sequence[GroupKind], cluster: Cluster) -> GroupKind | None:
    """Return the first of `kinds` that an empty cluster has ranks for, as it is there."""
    for kind in kinds:
        placed = cluster.place([kind])
        if placed is not None:
            return cluster.kind_at(kind, placed[0])
    return None


def widened_step(
    grouping: Grouping,
    present: Schedule,
    lengths: Sequence[int],
    cost_model: CostModel,
    cluster: Cluster,
    sync: str,
    attention: str,
) -> WiderStep | None:
    """Cost the step with the slowest group that its end depends on at twice its degree.

    As few other groups of the micro-batch as possible make room, those that end first; their sequences go, the longest
    first, to the groups that then end first and have memory for them.

    Args:
        grouping: Of the plan.
        present: Its schedule.
        lengths: Tokens of every sequence.
        cost_model: Predicts time and memory.
        cluster: The nodes.
        sync: Of the plan.
        attention: Method in place of ``"local"``.

    Returns:
        `None` where the method, the ranks or the memory do not allow it.
    """
    m = max(present.critical, key=lambda at: present.times_s[at][present.critical[at]])
    g = present.critical[m]
    slowest = grouping[m][g]
    quickest_first = sorted((at for at in range(len(grouping[m])) if at != g), key=lambda at: present.times_s[m][at])
    others = [grouping[m][at] for at in quickest_first]
    for num_displaced in range(len(others) + 1):
        staying = others[num_displaced:]
        for kind in wider_kinds(slowest.kind, cost_model, cluster, attention):
            placed = cluster.place([kind, *(group.kind for group in staying)])
            if placed is None:
                continue
            micro_batch = [
                PlacedGroup(ranks, cluster.kind_at(group.kind, ranks), group.sequences)
                for ranks, group in zip(placed[1:], staying, strict=True)
            ]
            micro_batch.insert(0, PlacedGroup(placed[0], cluster.kind_at(kind, placed[0]), slowest.sequences))
            displaced = [i for group in others[:num_displaced] for i in group.sequences]
            spread = _spread(micro_batch, displaced, lengths, cost_model, cluster.num_ranks, sync)
            if spread is None:
                continue
            changed = (*grouping[:m], spread, *grouping[m + 1 :])
            made = schedule(changed, lengths, cost_model, cluster.num_ranks, sync)
            return WiderStep(m, kind.degree, present.times_s[m][g], made.times_s[m][0], num_displaced, made.step_time_s)
    return None


def _spread(
    groups: Sequence[PlacedGroup],
    sequences: Sequence[int],
    lengths: Sequence[int],
    cost_model: CostModel,
    num_ranks: int,
    sync: str,
) -> tuple[PlacedGroup, ...] | None:
    """Give `sequences` to groups, the longest first to the one that ends first with it; `None` where memory is short."""
    if not fits((tuple(groups),), lengths, cost_model, num_ranks, sync):
        return None
    held = [list(group.sequences) for group in groups]
    room = [
        cost_model.kind_max_tokens(group.kind, num_ranks, sync) - sum(lengths[i] for i in group.sequences)
        for group in groups
    ]
    times = [cost_model.kind_time_s([lengths[i] for i in g.sequences], g.kind, sync) for g in groups]
    for sequence in sorted(sequences, key=lambda i: (-lengths[i], i)):
        added = [float(cost_model.sequence_times_s([lengths[sequence]], group.kind)[0]) for group in groups]
        able = [at for at in range(len(groups)) if room[at] >= lengths[sequence]]
        if not able:
            return None
        at = min(able, key=lambda a: times[a] + added[a])
        held[at].append(sequence)
        room[at] -= lengths[sequence]
        times[at] += added[at]
    return tuple(PlacedGroup(g.ranks, g.kind, tuple(sorted(ids))) for g, ids in zip(groups, held, strict=True))
