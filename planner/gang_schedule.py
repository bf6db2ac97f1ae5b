"""When the groups of a step run under per-step, and in which micro-batches they are listed.

Ranks meet only inside their groups: a group starts when the previous groups of all its ranks have ended. The largest sum
over the groups of one rank is only a lower bound of the last end: ``{0}: 10 s, {1}: 1 s``, then ``{0, 1}: 5 s``, then
``{0}: 1 s, {1}: 10 s`` has sums of 16 s and takes 25 s. Where the groups with more ranks go first and any two sets of
ranks are disjoint or one inside the other, nobody waits, and the two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.problem import Problem


class GangGroup(NamedTuple):
    """A group on its ranks: its kind, as a place in `Problem.kinds`, and the ids of its sequences."""

    kind: int
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]


GangPlan = tuple[tuple[GangGroup, ...], ...]


@dataclass(frozen=True)
class GangSchedule:
    """Start and end of every group, by micro-batch, and the end of the last one."""

    starts_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]
    last_end_s: float


def schedule(micro_batches: Iterable[Sequence[tuple[Sequence[int], float]]]) -> GangSchedule:
    """Return when groups run, exactly.

    Args:
        micro_batches: In the order of execution; of every group its ranks and its seconds.
    """
    free_s: dict[int, float] = {}
    starts: list[tuple[float, ...]] = []
    ends: list[tuple[float, ...]] = []
    for micro_batch in micro_batches:
        begun = tuple(max(free_s.get(rank, 0.0) for rank in ranks) for ranks, _ in micro_batch)
        ended = tuple(start_s + time_s for start_s, (_, time_s) in zip(begun, micro_batch, strict=True))
        for (ranks, _), end_s in zip(micro_batch, ended, strict=True):
            free_s.update(dict.fromkeys(ranks, end_s))
        starts.append(begun)
        ends.append(ended)
    return GangSchedule(tuple(starts), tuple(ends), max(free_s.values(), default=0.0))


def gang_time_s(problem: Problem, group: GangGroup) -> float:
    """Predict the seconds of a group on the GPUs that it has."""
    kind = problem.cluster.kind_at(problem.kinds[group.kind], group.ranks)
    return problem.cost_model.kind_time_s([problem.lengths[i] for i in group.sequences], kind, problem.sync)


def gang_step_time_s(problem: Problem, plan: GangPlan) -> float:
    """Predict the whole step, the fixed part included."""
    timed = ([(group.ranks, gang_time_s(problem, group)) for group in micro_batch] for micro_batch in plan)
    return schedule(timed).last_end_s + problem.step_fixed_s


def in_micro_batches(groups: Iterable[GangGroup]) -> GangPlan:
    """List groups, given in their order of execution, in as few micro-batches as keep that order on every rank."""
    next_place: dict[int, int] = {}
    micro_batches: list[list[GangGroup]] = []
    for group in groups:
        place = max(next_place.get(rank, 0) for rank in group.ranks)
        if place == len(micro_batches):
            micro_batches.append([])
        micro_batches[place].append(group)
        next_place.update(dict.fromkeys(group.ranks, place + 1))
    return tuple(tuple(sorted(groups, key=lambda group: group.ranks)) for groups in micro_batches)


def best_order(problem: Problem, groups: Sequence[GangGroup]) -> tuple[GangPlan, float]:
    """Order groups that have their ranks; return them and the seconds of the step.

    More ranks first, which is best where sets of ranks are nested; else the largest group time or the least may serve.
    """
    times = [gang_time_s(problem, group) for group in groups]
    by_degree = sorted(range(len(groups)), key=lambda g: (-len(groups[g].ranks), -times[g], groups[g].ranks))
    # Where nobody waits, no other order is faster.
    orders = (by_degree, sorted(by_degree, key=lambda g: -times[g]), by_degree[::-1])
    tried = orders[:1] if _nested({group.ranks for group in groups}) else orders
    best: GangPlan = ()
    best_s = math.inf
    for order in tried:
        plan = in_micro_batches(groups[g] for g in order)
        step_time_s = gang_step_time_s(problem, plan)
        if step_time_s < best_s:
            best, best_s = plan, step_time_s
    return best, best_s


def _nested(found: set[tuple[int, ...]]) -> bool:
    """Say whether any two sets of ranks are disjoint or one inside the other."""
    # The smallest set seen so far at each rank; larger sets come first.
    smallest: dict[int, int] = {}
    for place, ranks in enumerate(sorted(found, key=lambda ranks: (-len(ranks), ranks))):
        if len({smallest.get(rank, -1) for rank in ranks}) > 1:
            return False
        smallest.update(dict.fromkeys(ranks, place))
    return True
