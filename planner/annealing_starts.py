"""Where annealing runs start: plans made quickly, each drawn at random, so that many starts are many different plans.

Which long sequences share a micro-batch decides most of a plan's time, and annealing seldom changes it: that would take
many worse steps at once. So starts differ in just that. Memory may overflow: annealing mends that where it can be mended.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from planner.baselines import homogeneous_shape
from planner.fill_kernels import climb, deal, expand, pack_until
from planner.problem import IntArray, Problem
from planner.search_tables import SearchTables

# Slots beyond the ranks, so that splits always find one.
SPARE_SLOTS = 4
# Degrees at which a sequence alone takes longer than this many times the fastest are not tried for its micro-batch.
_SLOWEST_ALONE = 4.0
_OVERFLOW_WEIGHT = 10.0
# A cut takes at least this part of an even share of the tokens.
_LEAST_CUT = 0.3
# Climbing costs about the square of the groups; beyond this many sequences times ranks, cuts go without.
_MOST_CLIMBED = 100_000


@dataclass
class State:
    """A plan in the making; see `planner.search_tables`."""

    assign: IntArray
    kind: IntArray
    batch: IntArray
    num_batches: int

    def copy(self) -> State:
        """Return a state that shares nothing."""
        return State(self.assign.copy(), self.kind.copy(), self.batch.copy(), self.num_batches)


def cut_state(problem: Problem, tables: SearchTables, count: int, random: np.random.Generator) -> State:
    """Return micro-batches contiguous in length, cut at random, each with the best shape that is climbed to by LPT.

    Cuts leave no more tokens than the micro-batches after them can hold.
    """
    state = _empty_state(problem, tables, count)
    climbing = len(tables.tokens) * problem.num_ranks <= _MOST_CLIMBED
    holds = float((tables.max_tokens / tables.degree).max()) * problem.num_ranks
    ends = np.cumsum(tables.tokens)
    first, used = 0, 0
    for m in range(count):
        if first == len(ends):
            break
        last = len(ends)
        if m < count - 1:
            left, num_after = int(ends[-1]) - used, count - m - 1
            most = min(holds, left)
            least = min(most, max(left - num_after * holds, _LEAST_CUT * left / (num_after + 1)))
            last = max(first + 1, int(np.searchsorted(ends, used + random.uniform(least, most), side="right")))
        _fill(tables, state, m, np.arange(first, last), climbing=climbing)
        first, used = last, int(ends[last - 1])
    return state


def tight_state(problem: Problem, tables: SearchTables, count: int, random: np.random.Generator) -> State:
    """Return micro-batches filled one after the other to a time each, drawn at random.

    The time is that of the longest waiting sequence alone at a drawn degree, or an even share of the waiting work if
    that is more, times a little: so the first micro-batches are only as long as their longest sequences demand, and
    short sequences fill what is left. The last micro-batch takes what waits then, and may overflow.
    """
    state = _empty_state(problem, tables, count)
    ladder = _ladder(tables)
    slots = problem.num_ranks + SPARE_SLOTS
    work_s = (tables.share_s * tables.degree[:, None]).min(axis=0) / problem.num_ranks
    waiting = np.arange(len(tables.tokens))
    for m in range(count - 1):
        if len(waiting) == 0:
            break
        longest = waiting[0]
        alone_s = tables.fixed_s[ladder] + tables.share_s[ladder, longest]
        alone_s = alone_s[tables.max_tokens[ladder] >= tables.tokens[longest]]
        if len(alone_s) == 0:
            break
        drawn_s = random.choice(alone_s[alone_s <= _SLOWEST_ALONE * alone_s.min()])
        even_s = float(tables.fixed_s.min()) + float(work_s[waiting].sum()) / (count - m)
        time_s = max(drawn_s * random.uniform(1.0, 1.1), even_s * random.uniform(0.8, 1.05)) * (1 + 1e-9)
        shape = np.zeros(problem.num_ranks, dtype=np.int64)
        group_of = np.empty(len(waiting), dtype=np.int64)
        num_groups = pack_until(
            time_s,
            waiting,
            ladder,
            tables.degree,
            tables.num_ranks,
            tables.packing,
            tables.tokens,
            tables.share_s,
            tables.fixed_s,
            tables.max_tokens,
            shape,
            group_of,
        )
        dealt = group_of >= 0
        state.assign[waiting[dealt]] = group_of[dealt] + m * slots
        state.kind[m * slots : m * slots + num_groups] = shape[:num_groups]
        waiting = waiting[~dealt]
    if len(waiting):
        _fill(tables, state, count - 1, waiting, climbing=True)
    return state


def tables_of(tables: SearchTables, members: IntArray) -> SearchTables:
    """Return the arrays of some of the sequences, given by their places in ascending order."""
    return dataclasses.replace(
        tables,
        ids=tables.ids[members],
        tokens=tables.tokens[members],
        share_s=np.ascontiguousarray(tables.share_s[:, members]),
    )


def with_part(
    problem: Problem, tables: SearchTables, state: State, batches: IntArray, members: IntArray, part: State
) -> State:
    """Return a state in which `part`, of the sequences `members`, takes the place of the micro-batches `batches`."""
    slots = problem.num_ranks + SPARE_SLOTS
    whole = _empty_state(problem, tables, state.num_batches)
    # Slots of one micro-batch may lie anywhere in the old state, and are together in the new one.
    place = np.zeros(len(state.kind), dtype=np.int64)
    for m in np.setdiff1d(np.arange(state.num_batches), batches):
        groups = np.flatnonzero((state.batch == m) & (state.kind >= 0))
        place[groups] = m * slots + np.arange(len(groups))
        whole.kind[place[groups]] = state.kind[groups]
    whole.assign[:] = place[state.assign]
    place = np.zeros(len(part.kind), dtype=np.int64)
    for inside, m in enumerate(batches):
        groups = np.flatnonzero((part.batch == inside) & (part.kind >= 0))
        place[groups] = m * slots + np.arange(len(groups))
        whole.kind[place[groups]] = part.kind[groups]
    whole.assign[members] = place[part.assign]
    return whole


def _empty_state(problem: Problem, tables: SearchTables, count: int) -> State:
    slots = problem.num_ranks + SPARE_SLOTS
    return State(
        np.zeros(len(tables.tokens), dtype=np.int64),
        np.full(count * slots, -1, dtype=np.int64),
        np.repeat(np.arange(count), slots),
        count,
    )


def _fill(tables: SearchTables, state: State, m: int, members: IntArray, *, climbing: bool) -> None:
    """Deal sequences to the best homogeneous shape of micro-batch m, or to the best shape climbed to from those."""
    slots = len(state.kind) // state.num_batches
    tokens, share_s = tables.tokens[members], np.ascontiguousarray(tables.share_s[:, members])
    arrays = (tokens, share_s, tables.fixed_s, tables.max_tokens)
    ladder = _ladder(tables)
    trial = np.zeros(len(members), dtype=np.int64)
    best_s, best_shape = math.inf, None
    for k in ladder:
        if tables.max_tokens[k] < tokens[0] and k != ladder[-1]:
            continue
        counts = homogeneous_shape(tables, int(k))
        if counts[k] == 0:
            continue
        if climbing:
            packing = (tables.degree, tables.num_ranks, tables.packing)
            value_s = climb(0, len(members), counts, ladder, *packing, *arrays, trial, _OVERFLOW_WEIGHT)
        else:
            slowest_s, overflow = deal(0, len(members), expand(counts), *arrays, trial)
            value_s = slowest_s * (1 + _OVERFLOW_WEIGHT * overflow)
        if value_s < best_s:
            best_s, best_shape = value_s, expand(counts)
            state.assign[members] = trial + m * slots
    if best_shape is not None:
        state.kind[m * slots : m * slots + len(best_shape)] = best_shape


def _ladder(tables: SearchTables) -> IntArray:
    """Return for every power-of-two degree the kind with the least time for the whole batch, ascending."""
    ladder = []
    for degree in sorted({int(d) for d in tables.degree if d & (d - 1) == 0}):
        first, num = int(tables.first_kind[degree]), int(tables.num_kinds[degree])
        ladder.append(min(range(first, first + num), key=lambda k: float(tables.share_s[k].sum())))
    return np.asarray(ladder, dtype=np.int64)
