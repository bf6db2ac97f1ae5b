"""The best per-step plan of a tiny batch on equal GPUs: every partition into groups, every kind, every schedule.

Groups that start in the order of their starts, each as early as its ranks allow, include a best schedule; which of the
free ranks a group takes does not matter then, since every later group starts no earlier. So a schedule is an order of the
groups, and the state after each is the ends of the ranks.
"""

from __future__ import annotations

import math

from planner.gang_schedule import GangGroup, GangPlan, in_micro_batches
from planner.problem import DraftGroup, Problem

_MAX_SEQUENCES = 6
# Bell numbers: partitions of so many sequences.
_PARTITIONS = (1, 1, 2, 5, 15, 52, 203)
_MAX_CHOICES = 40_000


def is_tiny_gang(problem: Problem) -> bool:
    """Say whether `exact_gang` takes a fraction of a second and its answer holds for the cluster."""
    n = len(problem.lengths)
    if n > _MAX_SEQUENCES or len(problem.cluster.nodes) > 1:
        return False
    choices: int = _PARTITIONS[n] * len(problem.kinds) ** n
    return choices <= _MAX_CHOICES


def exact_gang(problem: Problem) -> GangPlan:
    """Return a plan of the least last end; ask `is_tiny_gang` first. The longest sequence must fit some kind."""
    search = _Exact(problem)
    search.extend(0, [])
    return in_micro_batches(search.best)


class _Exact:
    """Depth-first: sequences join groups one by one, longest first; then kinds, then schedules of what can still win."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best_s = math.inf
        self.best: list[GangGroup] = []
        self._options: dict[tuple[int, ...], list[tuple[float, int]]] = {}

    def extend(self, place: int, parts: list[tuple[int, ...]]) -> None:
        """Put the sequence at `place` into every part and into a new one."""
        if place == len(self.problem.lengths):
            self._choose(parts, [])
            return
        i = self.problem.descending[place]
        for index, part in enumerate(parts):
            grown = [*parts[:index], (*part, i), *parts[index + 1 :]]
            if self._of(grown[index]):
                self.extend(place + 1, grown)
        self.extend(place + 1, [*parts, (i,)])

    def _of(self, part: tuple[int, ...]) -> list[tuple[float, int]]:
        """Return the seconds and the kind of every group that can hold a part."""
        if part not in self._options:
            tokens = sum(self.problem.lengths[i] for i in part)
            fitting = [k for k, holds in enumerate(self.problem.max_tokens) if holds >= tokens]
            self._options[part] = sorted((self.problem.group_time_s(DraftGroup(k, part)), k) for k in fitting)
        return self._options[part]

    def _choose(self, parts: list[tuple[int, ...]], chosen: list[tuple[float, int]]) -> None:
        degrees = self.problem.degrees
        work_s = sum(time_s * degrees[k] for time_s, k in chosen)
        for part in parts[len(chosen) :]:
            work_s += min((time_s * degrees[k] for time_s, k in self._of(part)), default=math.inf)
        if work_s >= self.best_s * self.problem.num_ranks * (1 - 1e-12):
            return
        if len(chosen) == len(parts):
            order = tuple(range(len(parts)))
            self._schedule(parts, chosen, order, [0.0] * self.problem.num_ranks, 0.0, [])
            return
        for option in self._of(parts[len(chosen)]):
            if option[0] < self.best_s:
                self._choose(parts, [*chosen, option])

    def _schedule(
        self,
        parts: list[tuple[int, ...]],
        chosen: list[tuple[float, int]],
        left: tuple[int, ...],
        ends: list[float],
        last_start_s: float,
        groups: list[GangGroup],
    ) -> None:
        if not left:
            if max(ends) < self.best_s:
                self.best_s, self.best = max(ends), groups
            return
        order = sorted(range(len(ends)), key=lambda rank: (ends[rank], rank))
        tried = set()
        for g in left:
            time_s, k = chosen[g]
            degree = self.problem.degrees[k]
            start_s = max(last_start_s, ends[order[degree - 1]])
            if start_s + time_s >= self.best_s or (time_s, degree) in tried:
                continue
            tried.add((time_s, degree))
            ranks = order[:degree]
            after = list(ends)
            for rank in ranks:
                after[rank] = start_s + time_s
            placed = GangGroup(k, tuple(sorted(ranks)), parts[g])
            self._schedule(parts, chosen, tuple(h for h in left if h != g), after, start_s, [*groups, placed])
