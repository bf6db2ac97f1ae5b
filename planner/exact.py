"""The best plan of a tiny batch, by dynamic programming over subsets: every split, shape and assignment is covered.

Two levels. ``slowest[B][n]`` is the least makespan of the set of sequences B on n ranks: its lowest sequence is in some
group G of degree d, the rest is a smaller problem on n - d ranks. ``step[B]`` is the least sum over micro-batches: the
lowest sequence is in some micro-batch. Work grows as ``3^K * N * degrees``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from planner.problem import Draft, DraftGroup, DraftMicroBatch, Problem

# About a tenth of a second.
_MAX_WORK = 60_000


def is_tiny(problem: Problem) -> bool:
    """Say whether `exact_draft` takes a fraction of a second."""
    num = len(problem.lengths)
    return num <= 10 and 3**num * min(problem.num_ranks, 64) * len(problem.kinds) <= 2 * _MAX_WORK


def exact_draft(problem: Problem) -> Draft:
    """Return a draft of the least step time over all micro-batch splits, group shapes and assignments.

    Any groups whose degrees sum to at most the ranks count as possible at the same time: where the cluster does not
    place the draft, its time is a lower bound only. The longest sequence must fit some kind. Takes
    ``O(3^K * N * kinds)``; ask `is_tiny` first.
    """
    full = (1 << len(problem.lengths)) - 1
    makespans = _Makespans(problem)
    best: list[float] = [0.0] * (full + 1)
    choice = [0] * (full + 1)
    for members in range(1, full + 1):
        best[members] = math.inf
        for part in _parts(members):
            candidate = makespans.table[part][problem.num_ranks] + best[members ^ part]
            if candidate < best[members]:
                best[members], choice[members] = candidate, part
    micro_batches: list[DraftMicroBatch] = []
    while full:
        micro_batches.append(makespans.micro_batch(choice[full]))
        full ^= choice[full]
    return tuple(micro_batches)


class _Makespans:
    """``table[B][n]``: least makespan of the set B on n ranks, infinite where none fits; and the groups behind it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.num_ranks = problem.num_ranks
        size = 1 << len(problem.lengths)
        self.table: list[list[float]] = [[0.0] * (self.num_ranks + 1)]
        self.choice: list[list[tuple[int, int]]] = [[(0, 0)] * (self.num_ranks + 1)]
        degrees = problem.degrees
        times = [self._group_times(members) for members in range(size)]
        for members in range(1, size):
            row, chosen = [math.inf] * (self.num_ranks + 1), [(0, 0)] * (self.num_ranks + 1)
            for group in _parts(members):
                rest = self.table[members ^ group]
                for kind, time_s in times[group]:
                    degree = degrees[kind]
                    for ranks in range(degree, self.num_ranks + 1):
                        makespan_s = max(time_s, rest[ranks - degree])
                        if makespan_s < row[ranks]:
                            row[ranks], chosen[ranks] = makespan_s, (group, kind)
            self.table.append(row)
            self.choice.append(chosen)

    def micro_batch(self, members: int) -> DraftMicroBatch:
        groups: list[DraftGroup] = []
        ranks = self.num_ranks
        while members:
            group, kind = self.choice[members][ranks]
            groups.append(DraftGroup(kind, self._ids(group)))
            members, ranks = members ^ group, ranks - self.problem.degrees[kind]
        return tuple(groups)

    def _ids(self, members: int) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.problem.lengths)) if members >> i & 1)

    def _group_times(self, members: int) -> list[tuple[int, float]]:
        ids = self._ids(members)
        tokens = sum(self.problem.lengths[i] for i in ids)
        fitting = [k for k, holds in enumerate(self.problem.max_tokens) if holds >= tokens]
        return [(k, self.problem.group_time_s(DraftGroup(k, ids))) for k in fitting]


def _parts(members: int) -> Iterator[int]:
    """Yield the subsets of `members` that hold its lowest element."""
    lowest = members & -members
    others = members ^ lowest
    subset = others
    while True:
        yield subset | lowest
        if subset == 0:
            return
        subset = (subset - 1) & others
