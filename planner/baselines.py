"""What others do: one static degree for every step, or the best single degree for each batch."""

from __future__ import annotations

from planner.balance import Shares, deal, relieve
from planner.bounds import area_s
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
        if best is not None and (found > _EXTRA_COUNTS or _floor_s(problem, count) >= problem.step_time_s(best)):
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
    """Plan with the one degree that suits this batch best (FlexSP's "batch-adaptive" baseline)."""
    drafts = [static_draft(problem, degree) for degree in feasible_static_degrees(problem)]
    return min(drafts, key=problem.step_time_s)


def _fill(problem: Problem, shape: tuple[int, ...], count: int) -> Draft | None:
    order = problem.descending
    micro_batches: list[DraftMicroBatch] = []
    for run in split_contiguous([problem.lengths[i] for i in order], count):
        dealt = deal(Shares(problem, order[run]), shape)
        if dealt is None:
            return None
        micro_batches.append(relieve(problem, dealt).draft())
    return tuple(micro_batches)


def _floor_s(problem: Problem, count: int) -> float:
    return count * problem.cost_model.b1_s + area_s(problem) + problem.cost_model.fixed_step_s
