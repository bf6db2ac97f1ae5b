"""What others do: one static degree for every step, or the best single degree for each batch."""

from __future__ import annotations

import math

from planner.balance import Shares, deal, relieve
from planner.errors import InfeasibleError
from planner.micro_batches import candidate_counts, split_contiguous
from planner.problem import Draft, DraftMicroBatch, Problem
from planner.shape_search import homogeneous_shape

# Counts tried beyond the first that memory allows: more micro-batches cost their fixed time and seldom pay.
_EXTRA_COUNTS = 2


def feasible_static_degrees(problem: Problem) -> list[int]:
    """Return the allowed degrees whose groups hold the longest sequence, ascending."""
    longest = problem.lengths[problem.descending[0]]
    return [degree for degree in problem.degrees if problem.max_tokens[degree] >= longest]


def static_draft(problem: Problem, degree: int) -> Draft:
    """Plan with floor(N/degree) groups of one degree in every micro-batch; left-over ranks stay idle.

    Micro-batches are contiguous in length, groups filled by LPT and evened out by moves and swaps. No clock is asked.

    Args:
        problem: The batch; `degree` is one of its degrees.
        degree: Ranks of every group.

    Returns:
        The best draft over a few micro-batch counts.

    Raises:
        InfeasibleError: The longest sequence does not fit a group of this degree.
    """
    longest = problem.descending[0]
    holds = problem.max_tokens[degree]
    if problem.lengths[longest] > holds:
        fitting = feasible_static_degrees(problem)
        advice = f"use a degree of at least {fitting[0]}" if fitting else "no allowed degree holds it; use more ranks"
        raise InfeasibleError(
            f"sequence {longest} has {problem.lengths[longest]} tokens, which a group of static degree {degree} "
            f"(at most {holds} tokens in {problem.cost_model.memory_limit_bytes:.0f} bytes per rank) cannot hold; "
            f"{advice}."
        )
    shape = homogeneous_shape(problem.num_ranks, degree)
    minimum = -(-sum(problem.lengths) // (len(shape) * holds))
    best: Draft | None = None
    found = 0
    for count in candidate_counts(minimum, len(problem.lengths)):
        if best is not None and (
            found > _EXTRA_COUNTS or static_floor_s(problem, degree, count) >= problem.step_time_s(best)
        ):
            break
        draft = _fill(problem, shape, count)
        if draft is not None:
            found += 1
            if best is None or problem.step_time_s(draft) < problem.step_time_s(best):
                best = draft
    # One sequence per micro-batch is the last count, and every sequence fits a group alone.
    if best is None:
        raise InfeasibleError(f"no micro-batch count lets groups of static degree {degree} hold the batch.")
    return best


def batch_adaptive_draft(problem: Problem) -> Draft:
    """Plan with the one degree that suits this batch best (FlexSP's "batch-adaptive" baseline).

    Degrees whose lower bound is above a plan already found are left out; the result is that of trying all.
    """
    longest = problem.descending[0]
    best: Draft | None = None
    best_s = math.inf
    degrees = feasible_static_degrees(problem)
    for degree in sorted(degrees, key=lambda d: (static_floor_s(problem, d, 1), d)):
        if static_floor_s(problem, degree, 1) * (1 - 1e-9) > best_s:
            break
        draft = static_draft(problem, degree)
        step_time_s = problem.step_time_s(draft)
        if step_time_s < best_s:
            best, best_s = draft, step_time_s
    if best is None:
        raise InfeasibleError(
            f"sequence {longest} has {problem.lengths[longest]} tokens; no allowed degree holds it. Use more ranks."
        )
    return best


def static_floor_s(problem: Problem, degree: int, count: int) -> float:
    """Return a lower bound of any plan with floor(N/degree) groups of `degree` and at least `count` micro-batches."""
    num_groups = problem.num_ranks // degree
    count = max(count, -(-sum(problem.lengths) // (num_groups * problem.max_tokens[degree])))
    spread_s = float(problem.share_s[degree].sum()) / num_groups
    return count * problem.fixed_s[degree] + spread_s + problem.cost_model.fixed_step_s


def _fill(problem: Problem, shape: tuple[int, ...], count: int) -> Draft | None:
    order = problem.descending
    micro_batches: list[DraftMicroBatch] = []
    for run in split_contiguous([problem.lengths[i] for i in order], count):
        dealt = deal(Shares(problem, order[run]), shape)
        if dealt is None:
            return None
        micro_batches.append(relieve(problem, dealt).draft())
    return tuple(micro_batches)
