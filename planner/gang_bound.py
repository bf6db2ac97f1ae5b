"""Certified lower bounds of the step under per-step, over every split into groups, placement and order.

Every group of degree d takes d ranks for its time, and no rank works longer than the last end T. So the rank-seconds of
all groups are at most N*T, whatever overlaps. Groups and sequences are counted by kind and bucket instead of one by one:

    minimise T
    sum_k x[q,k] = sequences of q                                   every sequence
    sum_q s_q x[q,k] <= capacity_k n[k],  n[k] whole                memory: a group holds at most its capacity
    sum_k (sum_q work[q,k] x[q,k] + fixed_k d_k n[k]) <= N T        rank-seconds, also of the nodes that serve a kind
    sum_q u(s_q/capacity_k) x[q,k] <= n[k]                          whole sequences do not share memory at will
    sum_q time[q,k] x[q,k] + fixed_k n[k] <= L n[k]                 no group is longer than the step
    sum_k d_k (sum_q u(time[q,k]/L) x[q,k] + u(fixed_k/L) n[k]) <= N    whole sequences do not share a rank's time at will
    sum_k (time[q,k] + fixed_k) x[q,k] <= T * sequences of q        each alone is within the step

with dual feasible functions u. The rows with L hold for plans with T <= L, so the program proves
``T >= min(L, its optimum)``: first for the L of a known plan, then for L between what is proven and what is known. A
sequence longer than L on a kind is not allowed there.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.bound_buckets import buckets_of, chord, dual_feasible, merged_kinds
from planner.bounds import area_s, longest_s
from planner.budget import Budget
from planner.problem import Problem
from planner.solver import SolveLimits, solve

# Solver tolerances are about 1e-7 of the scaled objective; a certified bound stays clear of them.
_SLACK = 2e-5
_MIP_GAP = 1e-4
_COUNTED_ROUNDS = 6
_MAX_ROUNDS = 30
# Levels this close to what is proven gain nothing.
_CLOSE = 5e-4


@dataclass(frozen=True)
class GangBound:
    """What was proven.

    Attributes:
        bound_s: Lower bound of the step, the fixed part included.
        rounds: Programs solved.
        note: Why programs proved nothing, for people; else empty.
    """

    bound_s: float
    rounds: int
    note: str = ""


def gang_floor_s(problem: Problem) -> float:
    """Return a lower bound of any plan under per-step by rank-seconds and the longest sequence alone, at once."""
    least_s = min(problem.fixed_s)
    # area_s leaves the least fixed part out; a group that holds at most its capacity carries its share of that too.
    per_token_s = min(least_s * d / max(1, holds) for d, holds in zip(problem.degrees, problem.max_tokens, strict=True))
    area = area_s(problem) + per_token_s * sum(problem.lengths) / problem.num_ranks
    return max(area, longest_s(problem)) * (1 - 1e-12) + problem.step_fixed_s


def gang_bound(
    problem: Problem, incumbent_s: float, budget: Budget, solvers: Sequence[str], time_limit_s: float | None
) -> GangBound:
    """Bound the time of every plan under per-step from below.

    Args:
        problem: The batch; the longest sequence fits some kind.
        incumbent_s: Seconds of the step of a known plan.
        budget: Clock, node limit and seed.
        solvers: In order of preference; none: only rank-seconds and the longest sequence count.
        time_limit_s: Seconds for all programs; `None` with a node limit.
    """
    fixed_s = problem.step_fixed_s
    proven_s, known_s = gang_floor_s(problem) - fixed_s, incumbent_s - fixed_s
    model = _Program(problem, known_s) if known_s > 0 and solvers else None
    start_s = budget.clock()
    level_s, open_s = known_s, known_s
    rounds, note = 0, ""
    while model is not None and rounds < (_COUNTED_ROUNDS if time_limit_s is None else _MAX_ROUNDS):
        left_s = None if time_limit_s is None else time_limit_s - (budget.clock() - start_s)
        if (left_s is not None and left_s < 0.02) or open_s - proven_s < _CLOSE * open_s:
            break
        limits = SolveLimits(left_s, budget.node_limit, budget.seed, _MIP_GAP)
        outcome = solve(model.build(level_s), limits=limits, solvers=solvers)
        rounds += 1
        if not outcome.solver:
            note = outcome.message
            break
        found_s = 0.0
        if outcome.status == "infeasible":
            found_s = level_s * (1 - _SLACK)
        elif outcome.bound is not None:
            found_s = min(level_s * (1 - _SLACK), (outcome.bound - _SLACK) * known_s)
        proven_s = max(proven_s, found_s)
        if found_s < level_s * (1 - 2 * _SLACK):
            # A higher level would prove less.
            open_s = level_s
        level_s = (proven_s + open_s) / 2
    return GangBound(min(proven_s, known_s) + fixed_s, rounds, note)


class _Program:
    """The program at any level; times in units of the incumbent."""

    def __init__(self, problem: Problem, scale_s: float) -> None:
        self.problem = problem
        self.scale_s = scale_s
        self.kinds = merged_kinds(problem)
        tokens = np.asarray(problem.lengths, dtype=np.int64)
        self.buckets = buckets_of(tokens, [kind.max_tokens for kind in self.kinds])
        self._parts = [[chord(bucket, kind) for bucket in self.buckets] for kind in self.kinds]

    def build(self, level_s: float) -> Any:
        """Return the `pulp.LpProblem` whose objective is T."""
        pulp = importlib.import_module("pulp")
        program = pulp.LpProblem("gang", pulp.LpMinimize)
        last_end = program.add_variable("T", lowBound=0, upBound=1.0)
        program += last_end
        short: list[list[tuple[Any, float]]] = [[] for _ in self.buckets]
        long: list[list[tuple[Any, float]]] = [[] for _ in self.buckets]
        alone: list[list[tuple[Any, float]]] = [[] for _ in self.buckets]
        work: dict[frozenset[int], list[tuple[Any, float]]] = {}
        # By dual feasible function of time: the terms over all kinds.
        shared: dict[int, list[tuple[Any, float]]] = {}
        for k, kind in enumerate(self.kinds):
            room_s = level_s * (1 + 1e-9) - kind.fixed_s
            if room_s <= 0:
                continue
            dealt = []
            for q, bucket in enumerate(self.buckets):
                if self._parts[k][q][2] > room_s or bucket.short_tokens > kind.max_tokens:
                    continue
                x = program.add_variable(f"x_{q}_{k}", lowBound=0, upBound=bucket.num_short)
                both = [(x, self._parts[k][q][0], bucket.short_tokens)]
                short[q].append((x, 1.0))
                if bucket.num_long > 0:
                    y = program.add_variable(f"y_{q}_{k}", lowBound=0, upBound=bucket.num_long)
                    long[q].append((y, 1.0))
                    both.append((y, self._parts[k][q][1], bucket.long_tokens))
                alone[q] += [(v, (self._parts[k][q][2] + kind.fixed_s) / self.scale_s) for v, _, _ in both]
                dealt.append((q, both))
            if not dealt:
                continue
            groups = program.add_variable(f"n_{k}", lowBound=0, cat=pulp.LpInteger)
            ranks, per_group = groups, float(kind.least_degree)
            if kind.least_degree != kind.most_degree:
                ranks, per_group = program.add_variable(f"r_{k}", lowBound=0), 1.0
                program += ranks - kind.least_degree * groups >= 0
                program += ranks - kind.most_degree * groups <= 0
            spent = [(v, seconds / self.scale_s) for _, both in dealt for v, seconds, _ in both]
            fixed = kind.fixed_s * per_group / self.scale_s
            work.setdefault(kind.pool, []).extend([*spent, (ranks, fixed)])
            program += pulp.LpAffineExpression([*spent, (ranks, -room_s * per_group / self.scale_s)]) <= 0
            if kind.tokens_per_rank < math.inf:
                unit = kind.tokens_per_rank * per_group
                held = [(v, s / unit) for _, both in dealt for v, _, s in both]
                program += pulp.LpAffineExpression([*held, (ranks, -1.0)]) <= 0
            memory = np.asarray([self.buckets[q].short_tokens for q, _ in dealt]) / kind.max_tokens
            for weights in dual_feasible(memory):
                row = [
                    (v, w) for (_, both), w in zip(dealt, weights.tolist(), strict=True) if w > 0 for v, _, _ in both
                ]
                if row:
                    program += pulp.LpAffineExpression([*row, (groups, -1.0)]) <= 0
            least_s = [*(self._parts[k][q][2] for q, _ in dealt), kind.fixed_s]
            times = np.minimum(1.0, np.asarray(least_s) / level_s * (1 - 1e-9))
            for u, weights in enumerate(dual_feasible(times)):
                row = [
                    (v, w * kind.least_degree)
                    for (_, both), w in zip(dealt, weights.tolist()[:-1], strict=True)
                    if w > 0
                    for v, _, _ in both
                ]
                shared.setdefault(u, []).extend([*row, (groups, float(weights[-1]) * kind.least_degree)])
        for bucket, shorts, longs, least in zip(self.buckets, short, long, alone, strict=True):
            program += pulp.LpAffineExpression(shorts) >= bucket.num_short
            if bucket.num_long > 0:
                program += pulp.LpAffineExpression(longs) >= bucket.num_long
            program += pulp.LpAffineExpression([*least, (last_end, -float(len(bucket.members)))]) <= 0
        nodes = self.problem.cluster.nodes
        for pool in {*work, frozenset(range(len(nodes)))}:
            size = sum(nodes[node].num_gpus for node in pool)
            terms = [term for other, found in work.items() if other <= pool for term in found]
            program += pulp.LpAffineExpression([*terms, (last_end, -float(size))]) <= 0
        for row in shared.values():
            program += pulp.LpAffineExpression(row) <= self.problem.num_ranks
        return program
