"""Simulated annealing over whole plans: many short runs from different starts, the best feasible state of all.

Runs differ in the number of micro-batches, the starts and the temperatures. Short runs from many starts find better
shapes than one long run, and the end of a very short one tells most of what a longer one will reach: so a run first
tries several starts briefly, and only the best goes on. Starts are fresh, or the best plan with some of its micro-batches
made anew; re-annealing the best plan gently finds the last per cent. A run is deterministic for its seed where it is
counted in chunks of proposals; by the clock it cools with the share of its time that has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner.anneal_kernel import anneal, judge, load_groups
from planner.annealing_starts import SPARE_SLOTS, State, cut_state, tables_of, tight_state, with_part
from planner.budget import Budget
from planner.problem import Draft, IntArray, Problem
from planner.search_tables import SearchTables

# Proposals between two looks at the clock and the true objective: enough to touch every sequence often.
_MOST_STEPS, _LEAST_STEPS, _STEPS_PER_SEQUENCE = 20_000, 1_000, 40
_LAST_TEMPERATURE = 5e-6
_LAST_MEMORY_WEIGHT = 100.0
_REFORM_SHARE = 0.05
# Micro-batch counts tried from what memory forces up.
_NUM_COUNTS = 3
# A count this much worse than the best one gets no further runs.
_HOPELESS = 1.03
# Starts tried in a run, and the share of its time that each gets.
_NUM_TRIALS, _TRIAL_SHARE = 5, 0.06
# A trial that overflows memory counts as this much worse, and as worse by its overflow.
_OVERFULL = 1.05
# Runs that only know fresh starts.
_FIRST_FRESH = 6


@dataclass(frozen=True)
class Cooling:
    """Where a run begins, in units of a mean micro-batch's time: its temperature and the weight of memory overflow."""

    temperature: float
    memory_weight: float


_COOLINGS = (Cooling(1e-3, 0.05), Cooling(4e-3, 0.3), Cooling(1e-3, 0.3), Cooling(2e-3, 0.05))
_GENTLE = Cooling(3e-4, 1.0)
_TRIAL = Cooling(1e-3, 0.3)


@dataclass
class AnnealingSearch:
    """The runs of one thread; `run` makes the next one.

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
    _longest_start_s: float = 0.0
    _best_of_count: dict[int, float] = field(default_factory=dict)

    def offer(self, draft: Draft) -> None:
        """Take a draft as a state to improve on."""
        total_s = self.problem.step_time_s(draft) - self.problem.step_fixed_s
        if total_s < self.best_s:
            self.best_s = total_s
            arrays = self.tables.state(draft, len(draft) * (self.problem.num_ranks + SPARE_SLOTS))
            self.best = State(*arrays, len(draft))

    def run(self, duration_s: float, left_s: float = math.inf) -> None:
        """Make one run of about `duration_s` (or of the budget's chunks), and keep its best state if it is better.

        Args:
            duration_s: Seconds.
            left_s: Seconds until runs must end: what cannot be interrupted, making a start, is not begun where an earlier
                one took longer.
        """
        place = self.num_runs
        self.num_runs += 1
        seed = self.seed * 1_000_003 + place
        in_time = self._longest_start_s < left_s
        if self.best is not None and ((place >= _NUM_COUNTS and place % 3 == 2) or not in_time):
            state, total_s = self._annealed(self.tables, self.best.copy(), _GENTLE, duration_s, seed)
        else:
            begun_s = self.budget.clock()
            refilling = place >= _FIRST_FRESH and place % 3 == 1
            if refilling and self.best is not None and len(used := _used_batches(self.best)) > 2:
                start, cooling = self._refilled(self.best, used, duration_s, seed), _COOLINGS[0]
            else:
                fresh = self._num_fresh
                self._num_fresh += 1
                start = self._best_trial(self.tables, self._next_count(fresh), duration_s, seed)
                cooling = _COOLINGS[(fresh // 2 + self.seed) % len(_COOLINGS)]
            left_s = duration_s - (self.budget.clock() - begun_s)
            share = 1 - _NUM_TRIALS * _TRIAL_SHARE
            state, total_s = self._annealed(self.tables, start, cooling, left_s, seed, share)
        if state is None:
            return
        known = self._best_of_count.get(state.num_batches, math.inf)
        self._best_of_count[state.num_batches] = min(known, total_s)
        better = total_s < self.best_s * (1 - 1e-12)
        if better and (self.tables.packing.only_sum or self.problem.fits(self.draft_of(state))):
            self.best, self.best_s = state, total_s

    def draft_of(self, state: State) -> Draft:
        """Return a state as a draft."""
        return self.tables.draft(state.assign, state.kind, state.batch)

    def _refilled(self, best: State, used: IntArray, duration_s: float, seed: int) -> State:
        """Return the best plan with two or three of its `used` micro-batches made anew, by trials of those alone."""
        random = np.random.default_rng((seed, 1))
        num = min(len(used) - 1, int(random.integers(2, 4)))
        batches = np.sort(random.choice(used, num, replace=False))
        members = np.flatnonzero(np.isin(best.batch[best.assign], batches))
        part = self._best_trial(tables_of(self.tables, members), num, duration_s, seed)
        return with_part(self.problem, self.tables, best, batches, members, part)

    def _best_trial(self, tables: SearchTables, count: int, duration_s: float, seed: int) -> State:
        """Anneal several fresh starts briefly, and return where the best of them ended; its memory may overflow."""
        random = np.random.default_rng(seed)
        begun_s = self.budget.clock()
        ends: list[tuple[float, int, State]] = []
        for trial in range(_NUM_TRIALS):
            # Making a start of many sequences takes long itself.
            tried_s = self.budget.clock() - begun_s
            if trial > 0 and tried_s >= duration_s * _NUM_TRIALS * _TRIAL_SHARE and self.budget.node_limit is None:
                break
            started_s = self.budget.clock()
            start = (cut_state if trial % 2 else tight_state)(self.problem, tables, count, random)
            if self.budget.node_limit is None:
                self._longest_start_s = max(self._longest_start_s, self.budget.clock() - started_s)
            trial_s, trial_seed = duration_s * _TRIAL_SHARE, seed * _NUM_TRIALS + trial
            state, total_s = self._annealed(tables, start, _TRIAL, trial_s, trial_seed, _TRIAL_SHARE)
            if state is None:
                state = start
                total_s, overflow = self._judged(tables, state)
                total_s *= _OVERFULL * (1 + overflow)
            ends.append((total_s, trial, state))
        return min(ends, key=lambda end: end[:2])[2]

    def _judged(self, tables: SearchTables, state: State) -> tuple[float, float]:
        """Return the seconds of a state, and the sum of its groups' overflows in capacities."""
        num_slots = len(state.kind)
        load, held = np.zeros(num_slots), np.zeros(num_slots, dtype=np.int64)
        members = np.zeros(num_slots, dtype=np.int64)
        load_groups(state.assign, state.kind, tables.share_s, tables.tokens, load, held, members)
        total_s, _ = judge(
            state.kind, state.batch, tables.fixed_s, tables.max_tokens, state.num_batches, load, held, members
        )
        used = members > 0
        overflow = np.maximum(held[used] / tables.max_tokens[state.kind[used]] - 1, 0).sum()
        return float(total_s), float(overflow)

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

    def _annealed(
        self,
        tables: SearchTables,
        state: State,
        cooling: Cooling,
        duration_s: float,
        seed: int,
        share_of_run: float = 1.0,
    ) -> tuple[State | None, float]:
        """Anneal `state`, which is changed; return the best feasible state on the way, if any, and its seconds."""
        num_slots = len(state.kind)
        load, held = np.zeros(num_slots), np.zeros(num_slots, dtype=np.int64)
        members = np.zeros(num_slots, dtype=np.int64)
        random = np.asarray([(seed * 2_654_435_761 + 88_172_645_463_325_252) % 2**64 | 1], dtype=np.uint64)
        done = progress(self.budget, duration_s, share_of_run)
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


def progress(budget: Budget, duration_s: float, share_of_run: float = 1.0) -> Callable[[], float]:
    """Return a function that says which share of a run is over, 1 at its end: by chunks or by the clock.

    Args:
        budget: A node limit says how many chunks a whole run has.
        duration_s: Seconds by the clock.
        share_of_run: The part of a whole run's chunks, where chunks are counted.
    """
    if budget.node_limit is not None:
        total = max(1, round(budget.node_limit * share_of_run))
        chunks = iter(range(total + 1))
        return lambda: next(chunks) / total
    start_s = budget.clock()
    length_s = max(1e-6, min(duration_s, budget.deadline_s - start_s))
    return lambda: 1.0 if budget.cancelled.is_set() else (budget.clock() - start_s) / length_s


def _used_batches(state: State) -> IntArray:
    """Return the micro-batches that have sequences: annealing may empty one, and loops over none would fail."""
    return np.unique(state.batch[state.assign])


def _between(first: float, last: float, share: float) -> float:
    return first * math.pow(last / first, share)
