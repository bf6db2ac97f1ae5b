"""Simulated annealing over gang schedules: short runs from several starts, the best plan of all of them.

As `planner.annealing` does for per-layer; a run is counted in chunks of proposals or cools by the clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.annealing import Cooling, progress
from planner.budget import Budget
from planner.gang_kernel import anneal_gang, load_slots
from planner.gang_schedule import GangPlan
from planner.gang_starts import scratch
from planner.gang_tables import GangState, GangTables
from planner.problem import IntArray

_CHUNK_STEPS = 10_000
_LAST_TEMPERATURE = 1e-6
_LAST_MEMORY_WEIGHT = 100.0
_REFORM_SHARE = 0.06
_COOLINGS = (Cooling(2e-4, 1.0), Cooling(1e-3, 0.3), Cooling(5e-5, 1.0), Cooling(5e-4, 0.3))
_GENTLE = Cooling(5e-5, 1.0)


@dataclass
class GangAnnealing:
    """The runs of one thread.

    Attributes:
        tables: Of the problem.
        budget: Clock and deadline, or the chunks of every run.
        seed: Of this thread.
        best_s: Seconds of the step of the best plan; infinite without one.
        best: The best plan.
        origin: Which start it comes from.
    """

    tables: GangTables
    budget: Budget
    seed: int
    best_s: float = math.inf
    best: GangPlan = ()
    origin: str = ""
    num_runs: int = 0
    _best_state: GangState | None = None
    _starts: list[tuple[str, GangState, float]] = field(default_factory=list)

    def offer(self, name: str, state: GangState, plan: GangPlan, step_time_s: float) -> None:
        """Take a state with its plan and seconds to start runs from; it need not be the best."""
        # Equal times mean equal states, nearly always.
        if all(step_time_s != known_s for _, _, known_s in self._starts):
            self._starts.append((name, state, step_time_s))
            self._starts.sort(key=lambda start: start[2])
        self._keep(name, state, plan, step_time_s)

    def run(self, duration_s: float) -> None:
        """Make one run of about `duration_s` (or of the budget's chunks), and keep its best plan if it is better."""
        place = self.num_runs
        self.num_runs += 1
        if self._best_state is not None and place % 3 == 2:
            name, start, cooling = self.origin, self._best_state, _GENTLE
        else:
            fresh = place - place // 3 + self.seed
            name, start, _ = self._starts[fresh % min(4, len(self._starts))]
            cooling = _COOLINGS[(fresh // 2) % len(_COOLINGS)]
        kinds = self._kinds(start, place)
        state = self._annealed(start.copy(), kinds, cooling, duration_s, self.seed * 1_000_003 + place)
        if state is not None:
            self._keep(name if name.endswith("annealed") else f"{name}, annealed", state, *self.tables.plan(state))

    def _keep(self, name: str, state: GangState, plan: GangPlan, step_time_s: float) -> None:
        if step_time_s < self.best_s * (1 - 1e-12):
            self.best, self.best_s, self.origin, self._best_state = plan, step_time_s, name, state.copy()

    def _kinds(self, start: GangState, place: int) -> IntArray:
        """Return the kinds of a run: blocks of degrees that divide each other are nested, so that ends are exact."""
        blocks, degree = self.tables.blocks, self.tables.search.degree
        usable = [k for k in range(len(degree)) if blocks.num[k] > 0]
        if all(d & (d - 1) == 0 for d in degree.tolist()) or place % 4 == 3:
            return np.asarray(usable, dtype=np.int64)
        present = {int(degree[blocks.kind[b]]) for b in start.block if b >= 0}
        base = max(present) if place % 2 else max(1, *(d & -d for d in present))
        chain = _chain(sorted(set(degree.tolist())), base)
        return np.asarray([k for k in usable if degree[k] in chain or degree[k] in present], dtype=np.int64)

    def _annealed(
        self, state: GangState, kinds: IntArray, cooling: Cooling, duration_s: float, seed: int
    ) -> GangState | None:
        search = self.tables.search
        load, held, members, end = scratch(self.tables, len(state.block))
        arrays = (search.tokens, search.share_s, search.fixed_s, search.max_tokens, self.tables.blocks)
        random = np.asarray([(seed * 2_654_435_761 + 88_172_645_463_325_252) % 2**64 | 1], dtype=np.uint64)
        done = progress(self.budget, duration_s)
        best: GangState | None = None
        best_s = math.inf
        while True:
            last_end_s, overfull = load_slots(state.assign, state.block, *arrays, load, held, members, end)
            if overfull == 0 and last_end_s < best_s:
                best, best_s = state.copy(), last_end_s
            share = done()
            if share >= 1:
                return best
            unit_s = max(last_end_s, 1e-30)
            anneal_gang(
                state.assign,
                state.block,
                *arrays,
                kinds,
                load,
                held,
                members,
                end,
                unit_s,
                5 if share < 0.7 else 7,
                unit_s * _between(cooling.temperature, _LAST_TEMPERATURE, share),
                unit_s * _between(cooling.memory_weight, _LAST_MEMORY_WEIGHT, share),
                _REFORM_SHARE,
                _CHUNK_STEPS,
                random,
            )


def _chain(degrees: Sequence[int], base: int) -> set[int]:
    """Return degrees that divide each other: from `base` down by its smallest factors, and up by doubling."""
    chain = {base}
    lower = base
    for degree in sorted(degrees, reverse=True):
        if degree < lower and lower % degree == 0:
            chain.add(degree)
            lower = degree
    upper = base
    while 2 * upper in degrees:
        upper *= 2
        chain.add(upper)
    return chain


def _between(first: float, last: float, share: float) -> float:
    return first * math.pow(last / first, share)
