"""Adaptive planning: several searches, the best draft of all of them, and never a worse one than a single degree.

The exact dynamic program where the batch is tiny. Else every homogeneous degree gives the first draft, at once; then
simulated annealing in one thread and, in another, a bound by integer programs over time levels and after it more
annealing; last, integer programs on micro-batches that are small enough. Compiled loops and solvers run without the
interpreter lock, so threads are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from planner.annealing import AnnealingSearch
from planner.baselines import batch_adaptive_draft
from planner.bounds import area_s, longest_s, step_lower_bound_s
from planner.budget import Budget
from planner.exact import exact_draft, is_tiny
from planner.integer_program import improve_with_program
from planner.level_bound import LevelBound, level_bound
from planner.problem import Draft, DraftMicroBatch, Problem
from planner.search_tables import SearchTables

# A draft this close to the bound of its micro-batches is left alone by the integer program.
_GOOD_ENOUGH = 1e-3
# Shares of the time limit: one annealing run, the bound, and the integer programs at the end.
_RUN_SHARE = 0.08
_BOUND_SHARE = 0.6
_PROGRAM_SHARE = 0.05
# Many short runs from different starts find better shapes than few long ones.
_SHORTEST_RUN_S, _LONGEST_RUN_S, _SEQUENCES_OF_RUN = 0.02, 0.1, 512
# Of the time limit, kept for making the plan from the draft, and for solvers that look at their clock late.
_FINISH_SHARE = 0.02
# Building and stopping a program takes about so long; with less time left, none is started.
_SHORTEST_PROGRAM_S = 0.02
# Annealing runs of each of the two searches where no clock counts.
_COUNTED_RUNS = 6
# A better draft is worth telling the caller from here on.
_WORTH_TELLING = 0.995


@dataclass(frozen=True)
class SearchResult:
    """A draft and where it came from.

    Attributes:
        draft: The best draft found.
        exact: It is proven to be the best of all drafts.
        reason: For people.
        lower_bound_s: No draft of the batch is faster, so far as the search itself proved; 0 if it proved nothing.
    """

    draft: Draft
    exact: bool
    reason: str
    lower_bound_s: float = 0.0


def adaptive_search(
    problem: Problem,
    budget: Budget,
    solvers: tuple[str, ...],
    *,
    num_threads: int = 2,
    on_better: Callable[[SearchResult], None] | None = None,
) -> SearchResult:
    """Return the best draft that the portfolio finds within `budget`.

    The homogeneous degrees are always tried to the end, whatever the budget: they are the floor.

    Args:
        problem: The batch, under per-layer; the longest sequence fits some kind.
        budget: Limits.
        solvers: In order of preference.
        num_threads: 1 or 2; with a node limit the answer does not depend on it.
        on_better: Called with the first draft and with clearly better ones, by this thread.
    """
    if is_tiny(problem):
        draft = exact_draft(problem)
        if problem.fits(draft):
            return SearchResult(draft, True, "exact: every micro-batch split, shape and assignment")
        # The dynamic program ignores where groups can be placed: its draft only bounds those that can.
        found = search_beyond_tiny(problem, budget, solvers, num_threads=num_threads, on_better=on_better)
        bound_s = max(found.lower_bound_s, problem.step_time_s(draft) * (1 - 1e-12))
        return SearchResult(found.draft, False, found.reason, bound_s)
    return search_beyond_tiny(problem, budget, solvers, num_threads=num_threads, on_better=on_better)


def search_beyond_tiny(
    problem: Problem,
    budget: Budget,
    solvers: tuple[str, ...],
    *,
    num_threads: int = 2,
    on_better: Callable[[SearchResult], None] | None = None,
) -> SearchResult:
    """Return the best draft of baselines, annealing and integer programs, for batches of any size."""
    tables = SearchTables.of(problem)
    baseline = batch_adaptive_draft(problem, tables)
    degree = problem.degrees[baseline[0][0].kind]
    first = SearchResult(baseline, False, f"homogeneous degree {degree}")
    if on_better is not None:
        on_better(first)
    if budget.expired():
        return first
    portfolio = _Portfolio(problem, tables, budget, solvers, first, on_better)
    return portfolio.counted() if budget.node_limit is not None else portfolio.timed(num_threads)


class _Portfolio:
    """The searches of one call and what they share."""

    def __init__(
        self,
        problem: Problem,
        tables: SearchTables,
        budget: Budget,
        solvers: tuple[str, ...],
        first: SearchResult,
        on_better: Callable[[SearchResult], None] | None,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.solvers = solvers
        self.first = first
        self.on_better = on_better
        self.finish_s = _FINISH_SHARE * (budget.left_s() or 0.0)
        self.told_s = problem.step_time_s(first.draft)
        self.searches = [AnnealingSearch(problem, tables, budget, budget.seed * 2 + n) for n in range(2)]
        for search in self.searches:
            search.offer(first.draft)

    def counted(self) -> SearchResult:
        """Search for a fixed number of steps: the same answer on every machine."""
        for search in self.searches:
            for _ in range(_COUNTED_RUNS):
                search.run(0.0)
        best = self._best()
        bound = level_bound(self.problem, best.draft, self.budget, self.solvers, None) if self.solvers else None
        return self._finished(best, bound)

    def timed(self, num_threads: int) -> SearchResult:
        """Search until the deadline."""
        left_s = self.budget.left_s() or 0.0
        longest_s = _LONGEST_RUN_S * max(1.0, len(self.problem.lengths) / _SEQUENCES_OF_RUN)
        run_s = max(_SHORTEST_RUN_S, min(_RUN_SHARE * left_s, longest_s))
        reserve_s = (_FINISH_SHARE + (_PROGRAM_SHARE if self.solvers else 0.0)) * left_s
        anneal_until_s = self.budget.deadline_s - reserve_s
        bound: LevelBound | None = None
        if num_threads > 1:
            with ThreadPoolExecutor(1, thread_name_prefix="planner-bound") as executor:
                beside = executor.submit(self._beside, run_s, left_s * _BOUND_SHARE, anneal_until_s)
                try:
                    self._anneal(self.searches[0], run_s, anneal_until_s, telling=True)
                    bound = beside.result()
                except BaseException:
                    # Leaving the executor waits for its thread.
                    self.budget.cancelled.set()
                    raise
        else:
            self._anneal(self.searches[0], run_s, anneal_until_s - left_s * _BOUND_SHARE * 0.6, telling=True)
            bound = self._bound(self.searches[0], left_s * _BOUND_SHARE * 0.6)
        return self._finished(self._best(), bound)

    def _beside(self, run_s: float, bound_s: float, until_s: float) -> LevelBound | None:
        search = self.searches[1]
        search.run(run_s)
        bound = self._bound(search, bound_s)
        self._anneal(search, run_s, until_s, telling=False)
        return bound

    def _bound(self, search: AnnealingSearch, limit_s: float) -> LevelBound | None:
        if not self.solvers or self.budget.expired() or search.best is None:
            return None
        return level_bound(self.problem, search.draft_of(search.best), self.budget, self.solvers, limit_s)

    def _anneal(self, search: AnnealingSearch, run_s: float, until_s: float, *, telling: bool) -> None:
        while (left_s := until_s - self.budget.clock()) > 0 and not self.budget.cancelled.is_set():
            search.run(min(run_s, left_s), left_s)
            if telling and self.on_better is not None:
                total_s = search.best_s + self.problem.step_fixed_s
                if total_s < self.told_s * _WORTH_TELLING:
                    self.told_s = total_s
                    self.on_better(self._best())

    def _best(self) -> SearchResult:
        best, best_s = self.first, self.problem.step_time_s(self.first.draft)
        for search in self.searches:
            if search.best is None:
                continue
            draft = search.draft_of(search.best)
            step_time_s = self.problem.step_time_s(draft)
            if step_time_s < best_s and self.problem.fits(draft):
                best, best_s = SearchResult(draft, False, f"annealing, {len(draft)} micro-batches"), step_time_s
        return best

    def _finished(self, best: SearchResult, bound: LevelBound | None) -> SearchResult:
        draft, notes, program_bound_s = self._programmed(best.draft)
        bound_s = bound.bound_s if bound is not None else 0.0
        if bound is not None and bound.note:
            notes = [*notes, f"bound: {bound.note}"]
        if len(draft) == 1:
            # Either all sequences share one micro-batch, which the program bounds, or there are at least two.
            two_s = step_lower_bound_s(self.problem, 2)
            bound_s = max(bound_s, min(program_bound_s + self.problem.step_fixed_s, two_s))
        return SearchResult(draft, False, "; ".join(dict.fromkeys([best.reason, *notes])), bound_s)

    def _programmed(self, draft: Draft) -> tuple[Draft, list[str], float]:
        """Return the draft after integer programs on its micro-batches, notes, and the sum of their bounds."""
        problem, budget = self.problem, self.budget
        micro_batches = list(draft)
        bounds = [_makespan_bound_s(_part(problem, m)) for m in micro_batches]
        slack_s = [problem.makespan_s(m) - bound for m, bound in zip(micro_batches, bounds, strict=True)]
        promising = [i for i in range(len(draft)) if slack_s[i] > _GOOD_ENOUGH * bounds[i]]
        promising.sort(key=lambda i: (len([s for g in micro_batches[i] for s in g.sequences]), -slack_s[i], i))
        notes: list[str] = []
        for place, index in enumerate(promising):
            if budget.expired() or not self.solvers:
                break
            left_s = budget.left_s()
            if left_s is not None:
                left_s -= self.finish_s
                if left_s < _SHORTEST_PROGRAM_S:
                    break
            # Solvers look at the clock now and then only.
            share_s = None if left_s is None else left_s / 2 / (len(promising) - place)
            result = improve_with_program(problem, micro_batches[index], bounds[index], share_s, budget, self.solvers)
            micro_batches[index] = result.micro_batch
            bounds[index] = max(bounds[index], result.bound_s)
            if result.note and result.note not in notes:
                notes.append(result.note)
        improved = tuple(micro_batches)
        better = improved if problem.step_time_s(improved) < problem.step_time_s(draft) else draft
        return better, notes, sum(bounds)


def _part(problem: Problem, micro_batch: DraftMicroBatch) -> Problem:
    lengths = tuple(problem.lengths[i] for group in micro_batch for i in group.sequences)
    return Problem(lengths, problem.cluster, problem.cost_model, problem.kinds, problem.sync)


def _makespan_bound_s(part: Problem) -> float:
    """Return a lower bound of one micro-batch that holds all sequences of `part`."""
    # Sums of thousands of floats are off by a few units in the last place; a bound must stay below.
    return max(min(part.fixed_s) + area_s(part), longest_s(part)) * (1 - 1e-12)
