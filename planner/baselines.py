"""What others do: one static degree for every step, or the best single degree for each batch.

Also how micro-batches that are contiguous in length are filled, which is where every search starts.
"""

from __future__ import annotations

import math

import numpy as np

from planner.errors import InfeasibleError
from planner.fill_kernels import deal, packs, relieve
from planner.micro_batches import candidate_counts, split_contiguous
from planner.problem import Draft, IntArray, Problem
from planner.search_tables import SearchTables

# Counts tried beyond the first that memory allows: more micro-batches cost their fixed time and seldom pay.
_EXTRA_COUNTS = 2
_RELIEVE_ROUNDS = 200


def feasible_static_degrees(problem: Problem) -> list[int]:
    """Return the allowed degrees whose groups hold the longest sequence, ascending."""
    longest = problem.lengths[problem.descending[0]]
    return sorted({d for d, holds in zip(problem.degrees, problem.max_tokens, strict=True) if holds >= longest})


def static_draft(problem: Problem, degree: int, tables: SearchTables | None = None) -> Draft:
    """Plan with as many groups of one degree as fit in every micro-batch; left-over ranks stay idle.

    Micro-batches are contiguous in length, groups filled by LPT and evened out by moves and swaps. No clock is asked.

    Args:
        problem: The batch; `degree` is one of its degrees.
        degree: Ranks of every group.
        tables: Of the problem, if they are there already.

    Returns:
        The best draft over a few micro-batch counts and the kinds of that degree.

    Raises:
        InfeasibleError: The longest sequence does not fit a group of this degree.
    """
    tables = SearchTables.of(problem) if tables is None else tables
    longest = problem.descending[0]
    kinds = problem.kinds_of_degree(degree)
    fitting = [k for k in kinds if problem.max_tokens[k] >= problem.lengths[longest]]
    if not fitting:
        holds = max(problem.max_tokens[k] for k in kinds)
        others = feasible_static_degrees(problem)
        advice = f"use a degree of at least {others[0]}" if others else "no allowed degree holds it; use more ranks"
        raise InfeasibleError(
            f"sequence {longest} has {problem.lengths[longest]} tokens, which a group of static degree {degree} "
            f"(at most {holds} tokens in {problem.cost_model.memory_limit_bytes:.0f} bytes per rank) cannot hold; "
            f"{advice}."
        )
    best: Draft | None = None
    best_s = math.inf
    for k in fitting:
        found = _best_count(problem, tables, k, best_s)
        if found is not None:
            best, best_s = found
    # One sequence per micro-batch is the last count, and every sequence fits a group alone.
    if best is None:
        raise InfeasibleError(f"no micro-batch count lets groups of static degree {degree} hold the batch.")
    return best


def batch_adaptive_draft(problem: Problem, tables: SearchTables | None = None) -> Draft:
    """Plan with the one degree that suits this batch best (FlexSP's "batch-adaptive" baseline).

    Degrees whose lower bound is above a plan already found are left out; the result is that of trying all.
    """
    tables = SearchTables.of(problem) if tables is None else tables
    longest = problem.descending[0]
    best: Draft | None = None
    best_s = math.inf
    floors = {d: _static_floor_s(problem, tables, d) for d in feasible_static_degrees(problem)}
    for degree in sorted(floors, key=lambda d: (floors[d], d)):
        if floors[degree] * (1 - 1e-9) > best_s:
            break
        draft = static_draft(problem, degree, tables)
        step_time_s = problem.step_time_s(draft)
        if step_time_s < best_s:
            best, best_s = draft, step_time_s
    if best is None:
        raise InfeasibleError(
            f"sequence {longest} has {problem.lengths[longest]} tokens; no allowed degree holds it. Use more ranks."
        )
    return best


def homogeneous_shape(tables: SearchTables, kind: int) -> IntArray:
    """Return how many groups of each kind a micro-batch of one kind has: as many as find ranks."""
    counts = np.zeros(len(tables.degree), dtype=np.int64)
    low, high = 0, tables.num_ranks // int(tables.degree[kind])
    while low < high:
        counts[kind] = (low + high + 1) // 2
        if packs(counts, tables.degree, tables.num_ranks, tables.packing):
            low = int(counts[kind])
        else:
            high = int(counts[kind]) - 1
    counts[kind] = low
    return counts


def _best_count(problem: Problem, tables: SearchTables, kind: int, best_s: float) -> tuple[Draft, float] | None:
    num_groups = int(homogeneous_shape(tables, kind)[kind])
    if num_groups == 0:
        return None
    holds = num_groups * problem.max_tokens[kind]
    spread_s = float(tables.share_s[kind].sum()) / num_groups
    best: Draft | None = None
    found = 0
    for count in candidate_counts(-(-sum(problem.lengths) // holds), len(problem.lengths)):
        floor_s = count * problem.fixed_s[kind] + spread_s + problem.step_fixed_s
        if floor_s >= best_s or found > _EXTRA_COUNTS:
            break
        draft = _filled(tables, kind, num_groups, count)
        if draft is None:
            continue
        found += 1
        step_time_s = problem.step_time_s(draft)
        if step_time_s < best_s and problem.fits(draft):
            best, best_s = draft, step_time_s
    return None if best is None else (best, best_s)


def _filled(tables: SearchTables, kind: int, num_groups: int, count: int) -> Draft | None:
    runs = split_contiguous(tables.tokens, count)
    shape = np.full(num_groups, kind, dtype=np.int64)
    arrays = (tables.tokens, tables.share_s, tables.fixed_s, tables.max_tokens)
    assign = np.zeros(len(tables.tokens), dtype=np.int64)
    for m, run in enumerate(runs):
        _, overflow = deal(run.start, run.stop, shape, *arrays, assign)
        if overflow > 0:
            return None
        relieve(run.start, run.stop, shape, *arrays, assign, _RELIEVE_ROUNDS)
        assign[run] += m * num_groups
    kinds = np.full(len(runs) * num_groups, kind, dtype=np.int64)
    return tables.draft(assign, kinds, np.repeat(np.arange(len(runs)), num_groups))


def _static_floor_s(problem: Problem, tables: SearchTables, degree: int) -> float:
    """Return a lower bound of any plan with floor(N/degree) groups of `degree`, over its kinds."""
    num_groups = problem.num_ranks // degree
    floors = []
    for k in problem.kinds_of_degree(degree):
        count = max(1, -(-sum(problem.lengths) // (num_groups * max(1, problem.max_tokens[k]))))
        floors.append(count * problem.fixed_s[k] + float(tables.share_s[k].sum()) / num_groups)
    return min(floors) + problem.step_fixed_s
