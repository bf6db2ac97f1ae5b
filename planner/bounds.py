"""Certified lower bounds of the time of a step, over every micro-batch split, shape and assignment.

Area. A group p of micro-batch m says ``d_p * (C_m - b1) >= sum of its sequences' rank-seconds + d_p * b2 [d_p > 1]``.
Summed over the groups, with ``sum d_p <= N`` and ``C_m >= b1``, and over micro-batches:

    sum_m C_m >= M*b1 + (1/N) * sum_k min_d (a1*s^2 + (a2 + communication[d])*s + [d > 1] * b2 * s / c_d)

where ``c_d`` is the tokens that one rank of a group of d holds, so a group's ranks carry ``d_p >= sum(s)/c_d``; the
minimum is over degrees that hold the sequence, and M is at least what memory forces. Longest: the micro-batch of a
sequence takes at least that sequence alone at its best degree, the others at least b1.
"""

from __future__ import annotations

import math

from planner.problem import Problem


def area_s(problem: Problem) -> float:
    """Return the seconds that all ranks together need for the sequences, spread evenly, without ``M*b1``."""
    b2_s = problem.cost_model.b2_s
    cheapest = [math.inf] * len(problem.lengths)
    for degree in problem.degrees:
        holds = problem.max_tokens[degree]
        for i, share_s in enumerate(problem.share_s[degree].tolist()):
            length = problem.lengths[i]
            if length <= holds:
                rank_s = share_s * degree
                if degree > 1:
                    rank_s += b2_s * length * degree / holds
                cheapest[i] = min(cheapest[i], rank_s)
    return math.fsum(cheapest) / problem.num_ranks


def longest_s(problem: Problem) -> float:
    """Return the largest, over sequences, of the time of that sequence alone in its best group."""
    alone = [math.inf] * len(problem.lengths)
    for degree in problem.degrees:
        fixed_s, holds = problem.fixed_s[degree], problem.max_tokens[degree]
        for i, share_s in enumerate(problem.share_s[degree].tolist()):
            if problem.lengths[i] <= holds:
                alone[i] = min(alone[i], share_s + fixed_s)
    return max(alone)


def step_lower_bound_s(problem: Problem, at_least_micro_batches: int = 1) -> float:
    """Return a lower bound of the predicted time of any plan of the batch, the fixed part of the step included.

    Args:
        problem: The batch.
        at_least_micro_batches: Only plans of at least so many micro-batches count.
    """
    b1_s, count = problem.cost_model.b1_s, max(problem.min_micro_batches, at_least_micro_batches)
    bound = max(count * b1_s + area_s(problem), (count - 1) * b1_s + longest_s(problem))
    # Sums of thousands of floats are off by a few units in the last place; a bound must stay below.
    return bound * (1 - 1e-12) + problem.cost_model.fixed_step_s
