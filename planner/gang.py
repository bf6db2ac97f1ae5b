"""Planning under per-step: parameters stay unsharded over micro-batches, ranks meet in their groups and once per step.

So a step is a gang schedule (`planner.gang_schedule`): it costs the last end and the fixed part of the step, and groups
of different micro-batches overlap. Lanes of every degree and sequences on the degree that suits each give the first plan
at once; annealing improves it, in another thread after the per-layer search's groups and programs that bound the step.
Tiny batches are searched exactly.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from planner.annealing import AnnealingSearch
from planner.baselines import batch_adaptive_draft, feasible_static_degrees
from planner.budget import Budget
from planner.errors import InfeasibleError
from planner.gang_annealing import GangAnnealing
from planner.gang_bound import GangBound, gang_bound, gang_floor_s
from planner.gang_exact import exact_gang, is_tiny_gang
from planner.gang_schedule import GangPlan, gang_step_time_s
from planner.gang_starts import lanes_floor_s, of_draft, static_lanes, suited
from planner.gang_tables import GangState, GangTables
from planner.problem import Problem

_SUITED = "sequences on the degree that suits each"
# How long a sequence may take alone on the degree that suits it, as shares of the rank-seconds spread evenly.
_FIRST_SHARE = 0.8
_ALONE_SHARES = (0.25, 0.4, 0.6, 1.0, 1.25, 1.6)
# Shares of the time limit: one annealing run, the per-layer search, the bound.
_RUN_SHARE = 0.09
_LAYER_SHARE = 0.1
_BOUND_SHARE = 0.35
_SHORTEST_RUN_S = 0.02
_COUNTED_RUNS = 6
_COUNTED_LAYER_RUNS = 2
# A better plan is worth telling the caller from here on.
_WORTH_TELLING = 0.995


@dataclass(frozen=True)
class GangResult:
    """A plan and where it came from.

    Attributes:
        micro_batches: Groups on their ranks; every rank runs its groups in this order.
        lower_bound_s: No plan of the batch is faster, so far as the search proved.
        reason: For people.
        exact: It is proven to be the best of all plans.
    """

    micro_batches: GangPlan
    lower_bound_s: float
    reason: str
    exact: bool = False


def static_gang(problem: Problem, degree: int) -> GangResult:
    """Plan lanes of one degree, each with its own number of groups; no clock is asked.

    Raises:
        InfeasibleError: The longest sequence does not fit a group of this degree.
    """
    tables = GangTables.of(problem)
    plan, _ = tables.plan(static_lanes(tables, degree)[0])
    return GangResult(plan, gang_floor_s(problem), f"static degree {degree}: {_counts(plan)}")


def batch_adaptive_gang(problem: Problem) -> GangResult:
    """Plan lanes of the one degree that suits this batch best; no clock is asked."""
    tables = GangTables.of(problem)
    degree, state, _ = _best_lanes(tables)[0]
    plan, _ = tables.plan(state)
    return GangResult(plan, gang_floor_s(problem), f"best single degree for this batch: {degree}; {_counts(plan)}")


def gang_search(
    problem: Problem,
    budget: Budget,
    solvers: Sequence[str],
    *,
    num_threads: int = 2,
    on_better: Callable[[GangResult], None] | None = None,
) -> GangResult:
    """Return the best plan that is found within `budget`; never slower than lanes of one degree.

    Args:
        problem: The batch, under per-step; the longest sequence fits some kind.
        budget: Limits; lanes of one degree are always tried to the end.
        solvers: Of the bound, in order of preference.
        num_threads: 1 or 2; with a node limit the answer does not depend on it.
        on_better: Called with the first plan and with clearly better ones, by this thread.
    """
    if is_tiny_gang(problem):
        plan = exact_gang(problem)
        return GangResult(plan, gang_step_time_s(problem, plan), f"exact: every gang schedule; {_counts(plan)}", True)
    return search_beyond_tiny_gang(problem, budget, solvers, num_threads=num_threads, on_better=on_better)


def search_beyond_tiny_gang(
    problem: Problem,
    budget: Budget,
    solvers: Sequence[str],
    *,
    num_threads: int = 2,
    on_better: Callable[[GangResult], None] | None = None,
) -> GangResult:
    """Return the best plan of starts and annealing, for batches of any size."""
    search = _GangSearch(problem, budget, tuple(solvers), on_better)
    if not budget.expired():
        if budget.node_limit is not None:
            search.counted()
        else:
            search.timed(num_threads)
    return search.result()


class _GangSearch:
    """The searches of one call and what they share."""

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        solvers: tuple[str, ...],
        on_better: Callable[[GangResult], None] | None,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.solvers = solvers
        self.on_better = on_better
        self.tables = GangTables.of(problem)
        self.bound: GangBound | None = None
        self.searches = [GangAnnealing(self.tables, budget, budget.seed * 2 + n) for n in range(2)]
        for degree, state, _ in _best_lanes(self.tables):
            self._offer(f"lanes of degree {degree}", state)
        self._offer(_SUITED, suited(self.tables, self._base_s() * _FIRST_SHARE))
        self.told_s = math.inf
        self._tell(self.searches[0])

    def counted(self) -> None:
        """Search for a fixed number of steps: the same answer on every machine."""
        self._offer_suited()
        self._offer_layers(0.0)
        for search in self.searches:
            for _ in range(_COUNTED_RUNS):
                search.run(0.0)
        self.bound = gang_bound(self.problem, self._best().best_s, self.budget, self.solvers, None)

    def timed(self, num_threads: int) -> None:
        """Search until the deadline."""
        self._offer_suited()
        left_s = self.budget.left_s() or 0.0
        run_s = max(_SHORTEST_RUN_S, _RUN_SHARE * left_s)
        if num_threads > 1:
            with ThreadPoolExecutor(1, thread_name_prefix="planner-gang") as executor:
                beside = executor.submit(self._beside, run_s, left_s)
                try:
                    self._anneal(self.searches[0], run_s, self.budget.deadline_s)
                    beside.result()
                except BaseException:
                    # Leaving the executor waits for its thread.
                    self.budget.cancelled.set()
                    raise
        else:
            self._anneal(self.searches[0], run_s, self.budget.deadline_s - left_s * _BOUND_SHARE * 0.6)
            self._prove(self.searches[0], left_s * _BOUND_SHARE * 0.6)

    def result(self) -> GangResult:
        """Return the best plan so far, and what is proven about it."""
        best = self._best()
        bound_s = self.bound.bound_s if self.bound is not None else gang_floor_s(self.problem)
        reason = f"{best.origin}: {_counts(best.best)}"
        if self.bound is not None and self.bound.note:
            reason += f"; bound: {self.bound.note}"
        return GangResult(best.best, min(bound_s, best.best_s), reason)

    def _beside(self, run_s: float, left_s: float) -> None:
        search = self.searches[1]
        search.run(run_s)
        self._offer_layers(_LAYER_SHARE * left_s)
        search.run(run_s)
        self._prove(search, _BOUND_SHARE * left_s)
        while not self.budget.expired():
            search.run(run_s)

    def _base_s(self) -> float:
        return gang_floor_s(self.problem) - self.problem.step_fixed_s

    def _offer(self, name: str, state: GangState | None) -> None:
        if state is not None:
            plan, step_time_s = self.tables.plan(state)
            for search in self.searches:
                search.offer(name, state, plan, step_time_s)

    def _offer_suited(self) -> None:
        for share, sharing in itertools.product(_ALONE_SHARES, (True, False)):
            if not self.budget.expired():
                self._offer(_SUITED, suited(self.tables, self._base_s() * share, sharing=sharing))
        self._tell(self.searches[0])

    def _offer_layers(self, limit_s: float) -> None:
        """Offer the groups of the per-layer search on the same problem as a start to the second search."""
        layers = AnnealingSearch(self.problem, self.tables.search, self.budget, self.budget.seed)
        layers.offer(batch_adaptive_draft(self.problem, self.tables.search))
        for _ in range(_COUNTED_LAYER_RUNS):
            if not self.budget.expired():
                layers.run(limit_s / _COUNTED_LAYER_RUNS)
        if layers.best is not None:
            state = of_draft(self.tables, layers.draft_of(layers.best))
            self.searches[1].offer("groups of the per-layer plan", state, *self.tables.plan(state))

    def _prove(self, search: GangAnnealing, limit_s: float) -> None:
        if not self.budget.expired():
            self.bound = gang_bound(self.problem, search.best_s, self.budget, self.solvers, limit_s)

    def _anneal(self, search: GangAnnealing, run_s: float, until_s: float) -> None:
        while (left_s := until_s - self.budget.clock()) > 0 and not self.budget.cancelled.is_set():
            search.run(min(run_s, left_s))
            self._tell(search)

    def _tell(self, search: GangAnnealing) -> None:
        if self.on_better is not None and search.best_s < self.told_s * _WORTH_TELLING:
            self.told_s = search.best_s
            self.on_better(self.result())

    def _best(self) -> GangAnnealing:
        return min(self.searches, key=lambda search: search.best_s)


def _best_lanes(tables: GangTables) -> list[tuple[int, GangState, float]]:
    """Return degree, lanes and seconds of the degrees that hold the longest sequence, the fastest first.

    Degrees whose lower bound is above lanes already found are left out; the first is that of trying all.
    """
    found: list[tuple[int, GangState, float]] = []
    floors = {degree: lanes_floor_s(tables, degree) for degree in feasible_static_degrees(tables.problem)}
    for degree in sorted(floors, key=lambda d: (floors[d], d)):
        if found and floors[degree] * (1 - 1e-9) > min(step_time_s for _, _, step_time_s in found):
            break
        found.append((degree, *static_lanes(tables, degree)))
    if not found:
        raise InfeasibleError("no allowed degree holds the longest sequence. Use more ranks.")
    return sorted(found, key=lambda lanes: (lanes[2], lanes[0]))


def _counts(plan: GangPlan) -> str:
    """Say which degrees a plan uses and how many micro-batches ranks have."""
    degrees = Counter(len(group.ranks) for micro_batch in plan for group in micro_batch)
    of_rank = Counter(rank for micro_batch in plan for group in micro_batch for rank in group.ranks)
    least, most = min(of_rank.values()), max(of_rank.values())
    groups = ", ".join(f"{count} of degree {degree}" for degree, count in sorted(degrees.items()))
    return f"groups {groups}; {most if least == most else f'{least} to {most}'} micro-batches a rank"
