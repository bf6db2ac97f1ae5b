"""Adaptive planning: several searches, the best draft of all of them, and never a worse one than a single degree.

In order: the exact dynamic program where the batch is tiny; else every homogeneous degree, LPT with hill climbing over
shapes for several micro-batch counts, then integer programs on the micro-batches of the best draft.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.balance import Balanced, Shape, Shares
from planner.baselines import batch_adaptive_draft
from planner.bounds import area_s, step_lower_bound_s
from planner.budget import Budget
from planner.exact import exact_draft, is_tiny
from planner.integer_program import improve_with_program
from planner.micro_batches import candidate_counts, split_contiguous
from planner.problem import Draft, DraftMicroBatch, Problem
from planner.shape_search import climb, filled_shape, polish

# A draft this close to the bound of its micro-batches is left alone by the integer program.
_GOOD_ENOUGH = 1e-3
# More micro-batches than memory forces cost their fixed time and seldom pay.
_MAX_COUNTS = 4
_NUM_CLIMBS = 3
_SOLVER_PATIENCE = 3
# With so few degrees every one is tried in every climb.
_FEW_DEGREES = 12


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
    best = batch_adaptive_draft(problem)
    best_s = problem.step_time_s(best)
    reason = f"homogeneous degree {best[0][0].degree}"
    climbed = _climb_counts(problem, best_s, budget)
    for climbs in climbed:
        step_time_s = problem.step_time_s(_draft(climbs))
        if step_time_s < best_s:
            best, best_s = _draft(climbs), step_time_s
            reason = f"LPT and hill climbing over group shapes, {len(climbs)} micro-batches"
    for climbs in climbed:
        polished = _draft(_polished(problem, climbs, budget))
        step_time_s = problem.step_time_s(polished)
        if step_time_s < best_s:
            best, best_s = polished, step_time_s
            reason = f"LPT and hill climbing over group shapes, {len(climbs)} micro-batches"
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


def _climb_counts(problem: Problem, best_s: float, budget: Budget) -> list[list[Balanced]]:
    """Return the climbs of several micro-batch counts, the fastest first."""
    floor_s = area_s(problem) + problem.cost_model.fixed_step_s
    climbed: list[list[Balanced]] = []
    for count in candidate_counts(problem.min_micro_batches, len(problem.lengths), num_tried=6):
        too_many = count * problem.cost_model.b1_s + floor_s >= best_s
        if len(climbed) >= _MAX_COUNTS or too_many or budget.expired():
            break
        climbs = _climbed(problem, count, budget)
        if climbs is not None:
            climbed.append(climbs)
            best_s = min(best_s, problem.step_time_s(_draft(climbs)))
    return sorted(climbed, key=lambda climbs: problem.step_time_s(_draft(climbs)))


def _climbed(problem: Problem, count: int, budget: Budget) -> list[Balanced] | None:
    order = problem.descending
    climbs: list[Balanced] = []
    for run in split_contiguous([problem.lengths[i] for i in order], count):
        ids = order[run]
        # Neighbours in length want similar shapes, so the last answer is a good start; the homogeneous ones are safe.
        starts = [climbs[-1].shape] if climbs else []
        found = climb(
            problem,
            Shares(problem, ids),
            starts + _homogeneous_starts(problem, ids),
            budget.expired,
            degrees=_coarse_degrees(problem),
        )
        if found is None:
            return None
        climbs.append(found)
    return climbs


def _polished(problem: Problem, climbs: list[Balanced], budget: Budget) -> list[Balanced]:
    polished: list[Balanced] = []
    for best in climbs:
        if budget.expired():
            polished.append(best)
            continue
        ids = tuple(sorted((i for group in best.members for i in group), key=lambda i: (-problem.lengths[i], i)))
        shares = Shares(problem, ids)
        others = climb(
            problem,
            shares,
            _homogeneous_starts(problem, ids),
            budget.expired,
            degrees=_coarse_degrees(problem),
            num_climbs=_NUM_CLIMBS,
        )
        if others is not None and others.makespan_s < best.makespan_s:
            best = others
        polished.append(polish(problem, shares, best, budget.expired))
    return polished


def _draft(balanced: list[Balanced]) -> Draft:
    return tuple(item.draft() for item in balanced)


def _homogeneous_starts(problem: Problem, ids: tuple[int, ...]) -> list[Shape]:
    num_ranks, degrees = problem.num_ranks, _coarse_degrees(problem)
    longest = max(problem.lengths[i] for i in ids)
    fitting = [degree for degree in degrees if problem.max_tokens[degree] >= longest] or [problem.degrees[-1]]
    return [filled_shape((degree,) * (num_ranks // degree), num_ranks, degrees) for degree in fitting]


def _coarse_degrees(problem: Problem) -> tuple[int, ...]:
    """Return a few of many allowed degrees, for the first climbs; polishing uses all of them."""
    degrees = problem.degrees
    if len(degrees) <= _FEW_DEGREES:
        return degrees
    return tuple(degree for degree in degrees if degree & (degree - 1) == 0 or degree == degrees[-1])


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
        # Easy programs end early; a hard one must not keep the caller waiting for a gain that seldom comes.
        share_s = None if left_s is None else left_s / (len(promising) - place + _SOLVER_PATIENCE)
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
