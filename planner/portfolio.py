"""Adaptive planning: several searches, the best draft of all of them, and never a worse one than a single degree.

In order: the exact dynamic program where the batch is tiny; else every homogeneous degree, LPT with hill climbing over
shapes for several micro-batch counts, then integer programs on the micro-batches of the best draft.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.balance import Balanced, Shape, Shares
from planner.baselines import feasible_static_degrees, static_draft
from planner.bounds import area_s, step_lower_bound_s
from planner.budget import Budget
from planner.exact import exact_draft, is_tiny
from planner.integer_program import improve_with_program
from planner.micro_batches import candidate_counts, split_contiguous
from planner.problem import Draft, DraftMicroBatch, Problem
from planner.shape_search import climb, filled_shape

# A draft this close to the bound of its micro-batches is left alone by the integer program.
_GOOD_ENOUGH = 1e-3


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


def adaptive_search(problem: Problem, budget: Budget, solvers: tuple[str, ...]) -> SearchResult:
    """Return the best draft that the portfolio finds within `budget`.

    The homogeneous degrees are always tried to the end, whatever the budget: they are the floor.
    """
    if is_tiny(problem):
        return SearchResult(exact_draft(problem), True, "exact: every micro-batch split, shape and assignment")
    return search_beyond_tiny(problem, budget, solvers)


def search_beyond_tiny(problem: Problem, budget: Budget, solvers: tuple[str, ...]) -> SearchResult:
    """Return the best draft of baselines, hill climbing and integer programs, for batches of any size.

    The longest sequence must fit some degree.
    """
    drafts = [
        (f"homogeneous degree {degree}", static_draft(problem, degree)) for degree in feasible_static_degrees(problem)
    ]
    reason, best = min(drafts, key=lambda named: problem.step_time_s(named[1]))
    best_s = problem.step_time_s(best)
    floor_s = area_s(problem) + problem.cost_model.fixed_step_s
    found = 0
    for count in candidate_counts(problem.min_micro_batches, len(problem.lengths), num_tried=6):
        if found > 3 or budget.expired() or count * problem.cost_model.b1_s + floor_s >= best_s:
            break
        draft = _climbed(problem, count, budget)
        if draft is None:
            continue
        found += 1
        step_time_s = problem.step_time_s(draft)
        if step_time_s < best_s:
            best, best_s = draft, step_time_s
            reason = f"LPT and hill climbing over group shapes, {len(draft)} micro-batches"
    programs = _programmed(problem, best, budget, solvers)
    bound_s = 0.0
    if len(best) == 1:
        # Either all sequences share one micro-batch, which the program bounds, or there are at least two.
        bound_s = min(programs.bound_s + problem.cost_model.fixed_step_s, step_lower_bound_s(problem, 2))
    return SearchResult(programs.draft, False, "; ".join([reason, *programs.notes]), bound_s)


@dataclass(frozen=True)
class _Programs:
    """What the integer programs made of a draft; `bound_s` is the sum of their bounds, each for its own sequences."""

    draft: Draft
    notes: list[str]
    bound_s: float


def _climbed(problem: Problem, count: int, budget: Budget) -> Draft | None:
    order = problem.descending
    micro_batches: list[DraftMicroBatch] = []
    previous: Balanced | None = None
    for run in split_contiguous([problem.lengths[i] for i in order], count):
        ids = order[run]
        # Neighbours in length want similar shapes, so the last answer is a good start; the homogeneous ones are safe.
        starts: list[Shape] = [] if previous is None else [previous.shape]
        starts += [
            filled_shape((degree,) * (problem.num_ranks // degree), problem.num_ranks, problem.degrees)
            for degree in _start_degrees(problem, ids)
        ]
        previous = climb(problem, Shares(problem, ids), starts, budget.expired)
        if previous is None:
            return None
        micro_batches.append(previous.draft())
    return tuple(micro_batches)


def _start_degrees(problem: Problem, ids: tuple[int, ...]) -> list[int]:
    longest = max(problem.lengths[i] for i in ids)
    degrees = [degree for degree in problem.degrees if problem.max_tokens[degree] >= longest]
    # With any degree allowed there are as many starts as ranks; a geometric choice of them is enough.
    return degrees if len(degrees) <= 12 else degrees[:: len(degrees) // 8] + degrees[-1:]


def _programmed(problem: Problem, draft: Draft, budget: Budget, solvers: tuple[str, ...]) -> _Programs:
    micro_batches = list(draft)
    fixed_step_s = problem.cost_model.fixed_step_s
    bounds = [step_lower_bound_s(_part(problem, micro_batch)) - fixed_step_s for micro_batch in micro_batches]
    slack_s = [problem.makespan_s(m) - bound for m, bound in zip(micro_batches, bounds, strict=True)]
    promising = [i for i in range(len(draft)) if slack_s[i] > _GOOD_ENOUGH * bounds[i]]
    promising.sort(key=lambda i: (-slack_s[i], i))
    notes: list[str] = []
    for place, index in enumerate(promising):
        if budget.expired() or not solvers:
            break
        left_s = budget.left_s()
        share_s = None if left_s is None else left_s / (len(promising) - place)
        result = improve_with_program(problem, micro_batches[index], bounds[index], share_s, budget, solvers)
        micro_batches[index] = result.micro_batch
        bounds[index] = max(bounds[index], result.bound_s)
        if result.note and result.note not in notes:
            notes.append(result.note)
    improved = tuple(micro_batches)
    better = improved if problem.step_time_s(improved) < problem.step_time_s(draft) else draft
    return _Programs(better, notes, sum(bounds))


def _part(problem: Problem, micro_batch: DraftMicroBatch) -> Problem:
    lengths = tuple(problem.lengths[i] for group in micro_batch for i in group.sequences)
    return Problem(lengths, problem.num_ranks, problem.cost_model, problem.attention, problem.degrees)
