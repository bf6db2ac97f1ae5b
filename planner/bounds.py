"""Certified lower bounds of the time of a step under per-layer, over every micro-batch split, shape and assignment.

Area. A group p of micro-batch m says ``d_p * (C_m - f) >= sum of its sequences' rank-seconds + d_p * (f_p - f)`` with
f_p the fixed seconds of its kind and f the least of all kinds. Summed over the groups, with ``sum d_p <= N`` and
``C_m >= f``, and over micro-batches:

    sum_m C_m >= M*f + (1/N) * sum_k min over kinds of d * (share(s) + (f_p - f) * s / capacity)

since a group that holds at most its capacity carries at least ``sum(s)/capacity`` of its fixed part; the minimum is over
kinds that hold the sequence, and M is at least what memory forces. Longest: the micro-batch of a sequence takes at least
that sequence alone in its best group, the others at least f.

A stronger bound by integer programs is in `planner.level_bound`.
"""

from __future__ import annotations

import math

import numpy as np

from planner.problem import Problem


def area_s(problem: Problem) -> float:
    """Return the seconds that all ranks together need for the sequences, spread evenly, without ``M*b1``."""
    tokens = np.asarray(problem.lengths, dtype=np.float64)
    least_fixed_s = min(problem.fixed_s)
    cheapest = np.full(len(tokens), np.inf)
    for k, degree in enumerate(problem.degrees):
        holds = problem.max_tokens[k]
        rank_s = (problem.share_s[k] + (problem.fixed_s[k] - least_fixed_s) * tokens / max(1, holds)) * degree
        cheapest = np.minimum(cheapest, np.where(tokens <= holds, rank_s, np.inf))
    return math.fsum(cheapest.tolist()) / problem.num_ranks


def longest_s(problem: Problem) -> float:
    """Return the largest, over sequences, of the time of that sequence alone in its best group."""
    tokens = np.asarray(problem.lengths)
    alone = np.full(len(tokens), np.inf)
    for k, fixed_s in enumerate(problem.fixed_s):
        alone = np.minimum(alone, np.where(tokens <= problem.max_tokens[k], problem.share_s[k] + fixed_s, np.inf))
    return float(alone.max())


def step_lower_bound_s(problem: Problem, at_least_micro_batches: int = 1) -> float:
    """Return a lower bound of the predicted time of any plan of the batch, the fixed part of the step included.

    Args:
        problem: The batch, under per-layer.
        at_least_micro_batches: Only plans of at least so many micro-batches count.
    """
    fixed_s, count = min(problem.fixed_s), max(problem.min_micro_batches, at_least_micro_batches)
    bound = max(count * fixed_s + area_s(problem), (count - 1) * fixed_s + longest_s(problem))
    # Sums of thousands of floats are off by a few units in the last place; a bound must stay below.
    return bound * (1 - 1e-12) + problem.step_fixed_s
