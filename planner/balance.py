"""Filling groups of a given shape: longest processing time first (LPT), then moves and swaps off the slowest group.

A shape is the degrees of the groups of one micro-batch, descending. Groups that get no sequence cost nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.problem import DraftGroup, DraftMicroBatch, Problem

Shape = tuple[int, ...]

# An improvement smaller than this share of the makespan is rounding.
MIN_GAIN = 1e-9


@dataclass(frozen=True)
class Balanced:
    """Sequences dealt to the groups of a shape.

    Attributes:
        shape: Degree of every group.
        members: Sequence ids of every group, in step with `shape`.
        makespan_s: Time of the slowest group that has sequences.
    """

    shape: Shape
    members: tuple[tuple[int, ...], ...]
    makespan_s: float

    def draft(self) -> DraftMicroBatch:
        """Return the groups that have sequences."""
        pairs = zip(self.shape, self.members, strict=True)
        return tuple(DraftGroup(degree, ids) for degree, ids in pairs if ids)


class Shares:
    """Plain-Python tables of one micro-batch, longest sequence first, for the loops that numpy would only slow down.

    Attributes:
        ids: Sequence ids, longest first.
        lengths: Their tokens.
        share_s: Seconds each adds to a group, by degree.
    """

    def __init__(self, problem: Problem, ids: Sequence[int]) -> None:
        self.problem = problem
        self.ids = list(ids)
        self.lengths = [problem.lengths[i] for i in self.ids]
        index = np.asarray(self.ids)
        self.share_s = {degree: problem.share_s[degree][index].tolist() for degree in problem.degrees}


def deal(shares: Shares, shape: Shape, cutoff_s: float = math.inf) -> Balanced | None:
    """Deal sequences longest first, each to the group that would finish it earliest and can hold it.

    Args:
        shares: The micro-batch.
        shape: Degrees of the groups.
        cutoff_s: Give up as soon as a group would end at or after this.

    Returns:
        The balanced groups, or `None` if memory or the cut-off forbids this shape to LPT.
    """
    problem = shares.problem
    queues: dict[int, list[tuple[float, int]]] = {}
    for group, degree in enumerate(shape):
        queues.setdefault(degree, []).append((problem.fixed_s[degree], group))
    # Lists of equal times in ascending group order are heaps already.
    classes = [(degree, queue, problem.max_tokens[degree], shares.share_s[degree]) for degree, queue in queues.items()]
    held = [0] * len(shape)
    members: list[list[int]] = [[] for _ in shape]
    makespan_s = 0.0
    for position, length in enumerate(shares.lengths):
        best_s, best_queue, best_entry = cutoff_s, None, None
        for _, queue, max_tokens, share_s in classes:
            room = max_tokens - length
            if room < 0:
                continue
            entry = queue[0]
            if held[entry[1]] > room:
                fitting = [other for other in queue if held[other[1]] <= room]
                if not fitting:
                    continue
                entry = min(fitting)
            end_s = entry[0] + share_s[position]
            if end_s < best_s:
                best_s, best_queue, best_entry = end_s, queue, entry
        if best_queue is None or best_entry is None:
            return None
        group = best_entry[1]
        if best_queue[0] is best_entry:
            heapq.heapreplace(best_queue, (best_s, group))
        else:
            best_queue[best_queue.index(best_entry)] = (best_s, group)
            heapq.heapify(best_queue)
        held[group] += length
        members[group].append(shares.ids[position])
        if best_s > makespan_s:
            makespan_s = best_s
    return Balanced(shape, tuple(map(tuple, members)), makespan_s)


def relieve(problem: Problem, balanced: Balanced, max_rounds: int = 200) -> Balanced:
    """Move a sequence off the slowest group, or swap one of its sequences, while that makes the slowest pair faster.

    Args:
        problem: The batch.
        balanced: Groups to improve; memory holds before and after.
        max_rounds: Moves and swaps at most, so that the work is bounded without a clock.

    Returns:
        Groups of the same shape, never slower.
    """
    ids = np.asarray([i for group in balanced.members for i in group])
    owner = np.repeat(np.arange(len(balanced.shape)), [len(group) for group in balanced.members])
    degree_row = {degree: row for row, degree in enumerate(problem.degrees)}
    row = np.asarray([degree_row[degree] for degree in balanced.shape])
    share = np.stack([problem.share_s[degree][ids] for degree in problem.degrees])
    tokens = np.asarray([problem.lengths[i] for i in ids])
    fixed = np.asarray([problem.fixed_s[degree] for degree in balanced.shape])
    limit = np.asarray([problem.max_tokens[degree] for degree in balanced.shape])
    num_groups = len(balanced.shape)
    for _ in range(max_rounds):
        time = fixed + np.bincount(owner, share[row[owner], np.arange(len(ids))], num_groups)
        held = np.bincount(owner, tokens, num_groups)
        used = np.bincount(owner, minlength=num_groups) > 0
        slow = int(np.argmax(np.where(used, time, -1.0)))
        mine, others = np.flatnonzero(owner == slow), np.flatnonzero(owner != slow)
        goal = time[slow] * (1 - MIN_GAIN)
        # Moves: rows are sequences of the slowest group, columns are groups.
        after = np.maximum(time[slow] - share[row[slow], mine][:, None], time + share[np.ix_(row, mine)].T)
        after[:, slow] = np.inf
        after[held + tokens[mine][:, None] > limit] = np.inf
        move = np.unravel_index(int(np.argmin(after)), after.shape)
        best = after[move]
        swap = None
        if len(others):
            theirs = owner[others]
            mine_after = time[slow] - share[row[slow], mine][:, None] + share[row[slow], others]
            back = time[theirs] - share[row[theirs], others] + share[np.ix_(row[theirs], mine)].T
            pair = np.maximum(mine_after, back)
            exchanged = tokens[mine][:, None] - tokens[others]
            pair[(held[slow] - exchanged > limit[slow]) | (held[theirs] + exchanged > limit[theirs])] = np.inf
            candidate = np.unravel_index(int(np.argmin(pair)), pair.shape)
            if pair[candidate] < best:
                best, swap = pair[candidate], candidate
        if best >= goal:
            break
        if swap is not None:
            first, second = mine[swap[0]], others[swap[1]]
            owner[first], owner[second] = owner[second], slow
        else:
            owner[mine[move[0]]] = move[1]
    members = tuple(tuple(int(i) for i in ids[owner == group]) for group in range(num_groups))
    improved = Balanced(balanced.shape, members, 0.0)
    makespan_s = problem.makespan_s(improved.draft())
    return balanced if makespan_s >= balanced.makespan_s else Balanced(balanced.shape, members, makespan_s)
