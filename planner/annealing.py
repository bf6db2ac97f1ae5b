"""Simulated annealing over whole plans: many short runs from different starts, the best feasible state of all.

Runs differ in the number of micro-batches, the start and the temperatures; short runs from many starts find better
shapes than one long run, and re-annealing the best state gently finds the last per cent. A run is deterministic for its
seed where it is counted in chunks of proposals; by the clock it cools with the share of its time that has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner.anneal_kernel import anneal, judge, load_groups
from planner.baselines import homogeneous_shape
from planner.budget import Budget
from planner.fill_kernels import climb, deal, expand, pack_until
from planner.micro_batches import split_contiguous
from planner.problem import Draft, IntArray, Problem
from planner.search_tables import SearchTables

# Proposals between two looks at the clock and the true objective: enough to touch every sequence often.
_MOST_STEPS, _LEAST_STEPS, _STEPS_PER_SEQUENCE = 20_000, 1_000, 40
# Slots beyond the ranks, so that splits always find one.
_SPARE_SLOTS = 4
# Degrees at which a sequence alone takes longer than this many times the fastest are not tried for its micro-batch.
_SLOWEST_ALONE = 2.5
_OVERFLOW_WEIGHT = 10.0
_LAST_TEMPERATURE = 5e-6
_LAST_MEMORY_WEIGHT = 100.0
_REFORM_SHARE = 0.05
# Micro-batch counts tried from what memory forces up.
_NUM_COUNTS = 3
# A count this much worse than the best one gets no further runs.
_HOPELESS = 1.03


@dataclass(frozen=True)
class Cooling:
    """Where a run begins, in units of a mean micro-batch's time: its temperature and the weight of memory overflow."""

    temperature: float
    memory_weight: float


_COOLINGS = (Cooling(1e-3, 0.05), Cooling(4e-3, 0.3), Cooling(1e-3, 0.3), Cooling(2e-3, 0.05))
_GENTLE = Cooling(3e-4, 1.0)


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


@dataclass
class AnnealingSearch:
    """The runs of one thread; `step` makes the next one.

    Attributes:
        problem: The batch.
        tables: Its arrays.
        budget: Clock and deadline, or the chunks of every run.
        seed: Of this thread.
        best_s: Seconds of the best state, without the fixed part of the step; infinite without one.
        best: The best feasible state, or `None`.
    """

    problem: Problem
    tables: SearchTables
    budget: Budget
    seed: int
    best_s: float = math.inf
    best: State | None = None
    num_runs: int = 0
    _num_fresh: int = 0
    _best_of_count: dict[int, float] = field(default_factory=dict)

    def offer(self, draft: Draft) -> None:
        """Take a draft as a state to improve on."""
        total_s = self.problem.step_time_s(draft) - self.problem.step_fixed_s
        if total_s < self.best_s:
            self.best_s = total_s
            arrays = self.tables.state(draft, len(draft) * (self.problem.num_ranks + _SPARE_SLOTS))
            self.best = State(*arrays, len(draft))

    def run(self, duration_s: float) -> None:
        """Make one run of about `duration_s` (or of the budget's chunks), and keep its best state if it is better."""
        place = self.num_runs
        self.num_runs += 1
        if self.best is not None and place >= _NUM_COUNTS and place % 3 == 2:
            start, cooling = self.best.copy(), _GENTLE
        else:
            fresh = self._num_fresh
            self._num_fresh += 1
            start = self._start(self._next_count(fresh), fresh)
            cooling = _COOLINGS[(fresh // 2 + self.seed) % len(_COOLINGS)]
        state, total_s = self._annealed(start, cooling, duration_s, seed=self.seed * 1_000_003 + place)
        if state is None:
            return
        known = self._best_of_count.get(start.num_batches, math.inf)
        self._best_of_count[start.num_batches] = min(known, total_s)
        better = total_s < self.best_s * (1 - 1e-12)
        if better and (self.tables.packing.only_sum or self.problem.fits(self.draft_of(state))):
            self.best, self.best_s = state, total_s

    def draft_of(self, state: State) -> Draft:
        """Return a state as a draft."""
        return self.tables.draft(state.assign, state.kind, state.batch)

    def _start(self, count: int, fresh: int) -> State:
        """Return a fresh state; the ways to make one take turns."""
        if fresh % 4 != 3:
            random = np.random.default_rng((self.seed, fresh))
            return tight_state(self.problem, self.tables, count, random)
        return start_state(self.problem, self.tables, count, climbing=(fresh // 4 + self.seed) % 2 == 0)

    def _next_count(self, fresh: int) -> int:
        """Return the number of micro-batches of the next fresh run: each a few times, then those that do well."""
        least, most = self.problem.min_micro_batches, len(self.problem.lengths)
        counts = list(dict.fromkeys(min(least + extra, most) for extra in range(_NUM_COUNTS)))
        if fresh < 2 * len(counts):
            return counts[fresh % len(counts)]
        best_s = min(self._best_of_count.values(), default=math.inf)
        good = [c for c in counts if self._best_of_count.get(c, math.inf) <= best_s * _HOPELESS] or counts
        good.sort(key=lambda c: self._best_of_count.get(c, math.inf))
        # The best count most often, the others in turn.
        return good[0] if fresh % 3 else good[(fresh // 3) % len(good)]

    def _annealed(self, state: State, cooling: Cooling, duration_s: float, seed: int) -> tuple[State | None, float]:
        tables = self.tables
        num_slots = len(state.kind)
        load, held = np.zeros(num_slots), np.zeros(num_slots, dtype=np.int64)
        members = np.zeros(num_slots, dtype=np.int64)
        random = np.asarray([(seed * 2_654_435_761 + 88_172_645_463_325_252) % 2**64 | 1], dtype=np.uint64)
        done = progress(self.budget, duration_s)
        best: State | None = None
        best_s = math.inf
        unit_s = 0.0
        steps = max(_LEAST_STEPS, min(_MOST_STEPS, _STEPS_PER_SEQUENCE * len(state.assign)))
        while True:
            load_groups(state.assign, state.kind, tables.share_s, tables.tokens, load, held, members)
            total_s, overfull = judge(
                state.kind, state.batch, tables.fixed_s, tables.max_tokens, state.num_batches, load, held, members
            )
            unit_s = unit_s or max(total_s / state.num_batches, 1e-30)
            if overfull == 0 and total_s < best_s:
                best, best_s = state.copy(), total_s
            share = done()
            if share >= 1:
                return best, best_s
            anneal(
                state.assign,
                state.kind,
                state.batch,
                state.num_batches,
                tables.tokens,
                tables.share_s,
                tables.fixed_s,
                tables.max_tokens,
                tables.degree,
                tables.first_kind,
                tables.num_kinds,
                tables.packing,
                tables.num_ranks,
                load,
                held,
                members,
                unit_s,
                5 if share < 0.7 else 7,
                unit_s * _between(cooling.temperature, _LAST_TEMPERATURE, share),
                unit_s * _between(cooling.memory_weight, _LAST_MEMORY_WEIGHT, share),
                _REFORM_SHARE,
                steps,
                random,
            )


def start_state(problem: Problem, tables: SearchTables, count: int, *, climbing: bool) -> State:
    """Return micro-batches contiguous in length with homogeneous shapes, or with shapes climbed to by LPT.

    Memory may overflow: annealing mends that where it can be mended.
    """
    runs = split_contiguous(tables.tokens, count)
    state = _empty_state(problem, tables, len(runs))
    for m, run in enumerate(runs):
        _fill(tables, state, m, np.arange(run.start, run.stop), climbing=climbing)
    return state


def tight_state(problem: Problem, tables: SearchTables, count: int, random: np.random.Generator) -> State:
    """Return micro-batches filled one after the other to a time each, drawn at random.

    The time is that of the longest waiting sequence alone at a drawn degree, or an even share of the waiting work if
    that is more, times a little: so the first micro-batches are only as long as their longest sequences demand, and
    short sequences fill what is left. The last micro-batch takes what waits then, and may overflow.
    """
    state = _empty_state(problem, tables, count)
    ladder = _ladder(tables)
    slots = problem.num_ranks + _SPARE_SLOTS
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


def _empty_state(problem: Problem, tables: SearchTables, count: int) -> State:
    slots = problem.num_ranks + _SPARE_SLOTS
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


def progress(budget: Budget, duration_s: float) -> Callable[[], float]:
    """Return a function that says which share of a run is over, 1 at its end: by chunks or by the clock."""
    if budget.node_limit is not None:
        chunks = iter(range(budget.node_limit + 1))
        total = budget.node_limit
        return lambda: next(chunks) / total
    start_s = budget.clock()
    length_s = max(1e-6, min(duration_s, budget.deadline_s - start_s))
    return lambda: 1.0 if budget.cancelled.is_set() else (budget.clock() - start_s) / length_s


def _between(first: float, last: float, share: float) -> float:
    return first * math.pow(last / first, share)


def _ladder(tables: SearchTables) -> IntArray:
    """Return for every power-of-two degree the kind with the least time for the whole batch, ascending."""
    ladder = []
    for degree in sorted({int(d) for d in tables.degree if d & (d - 1) == 0}):
        first, num = int(tables.first_kind[degree]), int(tables.num_kinds[degree])
        ladder.append(min(range(first, first + num), key=lambda k: float(tables.share_s[k].sum())))
    return np.asarray(ladder, dtype=np.int64)
